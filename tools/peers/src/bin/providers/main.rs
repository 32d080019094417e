//! One half of a conversation in verbs, on any provider; each half judges what the other does.
//!
//! `providers softroce:ADDRESS | rings:ADDRESS | host:ADDRESS | verbs:DEVICE [SERVER-ADDRESS]`
//!
//! Without a server it waits on TCP port 18516. Exit status 0 only if all was as it must be.
//! `ci/guest/verbs` runs it against the kernel's rxe, `tests/providers.rs` on what a machine has.

use std::net::{TcpListener, TcpStream};

mod conversation;
mod parts;

use conversation::{Result, converse};

const PORT: u16 = 18516;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let provider = args.next().ok_or("which provider?")?;
    let server = args.next();
    let stream = match &server {
        Some(server) => TcpStream::connect((server.as_str(), PORT))?,
        None => TcpListener::bind(("::", PORT))?.accept()?.0,
    };
    let count = converse(&provider, stream, server.is_some())?;
    println!("{provider}: {count} operations right");
    Ok(())
}
