//! `lowtide devices`.

use std::io::Write;

use super::Failure;
use crate::cli::DevicesArgs;
use crate::devices::Survey;

pub(super) fn devices(args: &DevicesArgs) -> Result<(), Failure> {
    let survey = Survey::take().map_err(Failure::cluster)?;
    let mut out = std::io::stdout().lock();
    let written = match args.json {
        true => writeln!(out, "{}", serde_json::json!(survey)),
        false => write!(out, "{survey}"),
    };
    written.map_err(Failure::output)
}
