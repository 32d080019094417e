//! `lowtide perftest-peer`.

use std::io::Write;

use lowtide_peers::end::ROCE_PORT;
use lowtide_peers::perftest::{Options, PeerError, Test, run};
use lowtide_transport::raw::types::QpType;

use super::Failure;
use crate::cli::{PerftestConnection, PerftestPeerArgs, PerftestProgram};
use crate::engine::capture_file;

pub(super) fn peer(args: &PerftestPeerArgs) -> Result<(), Failure> {
    let test = match args.program {
        PerftestProgram::IbSendLat => Test::SendLat,
        PerftestProgram::IbSendBw => Test::SendBw,
        PerftestProgram::IbWriteBw => Test::WriteBw,
        PerftestProgram::IbReadBw => Test::ReadBw,
        PerftestProgram::IbAtomicBw => Test::AtomicBw,
    };
    let options = Options {
        test,
        kind: match args.connection {
            PerftestConnection::Rc => QpType::Rc,
            PerftestConnection::Uc => QpType::Uc,
            PerftestConnection::Ud => QpType::Ud,
        },
        own: args.address,
        capture: capture_file((args.address, ROCE_PORT).into()),
        server: args.server.clone(),
        port: args.port,
        iterations: args.iterations.unwrap_or(test.iterations()),
        bytes: args.size.unwrap_or(test.bytes()),
    };
    // Nothing has to be put back at Ctrl-C: the signal may end the process where it is.
    let report = run(&options, |port| {
        eprintln!("waiting for {test} on TCP port {port}");
    });
    let report = report.map_err(|error| match error {
        PeerError::Options(_) => Failure::usage(error),
        _ => Failure::cluster(error),
    })?;
    writeln!(std::io::stdout(), "{report}").map_err(Failure::output)
}
