//! The `lowtide` command.

use std::process::ExitCode;

use clap::Parser;
use lowtide_cli::cli::Cli;
use lowtide_cli::commands::{self, Kind};

fn main() -> ExitCode {
    match commands::execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if failure.kind != Kind::Unread {
                eprintln!("lowtide: {failure}");
            }
            ExitCode::from(failure.kind as u8)
        }
    }
}
