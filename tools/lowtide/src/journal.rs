//! A client's journal of what it may call stable, kept outside of the cluster (`run --journal`).
//!
//! Paths of stored entries, each ended by a NUL byte, appended once the operations behind them are
//! stable and not before. Whoever finds a path here may hold the cluster to it, whatever happened
//! to the cluster since: `rsync --from0 --files-from` reads the format.
//!
//! Deliberately absent: syncing. The journal is to survive processes, not the machine.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::mpsc::Receiver;

use lowtide_engine_core::session::Session;

/// Opens a journal for going on; what a killed client left unfinished at its end is removed.
///
/// # Errors
/// The file cannot be opened, read or shortened.
pub fn open(path: &Path) -> io::Result<File> {
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|b| *b == 0).map_or(0, |i| i + 1);
    file.set_len(whole as u64)?;
    file.seek(SeekFrom::Start(whole as u64))?;
    Ok(file)
}

/// Writes down every path that arrives, once everything before it is stable; ends when no more
/// can arrive, or with the session, which is not the journal's to report.
///
/// # Errors
/// The file cannot be written.
pub fn keep<S: Session + ?Sized>(
    session: &S,
    executed: Receiver<Vec<u8>>,
    mut file: File,
) -> io::Result<()> {
    while let Ok(first) = executed.recv() {
        let mut batch = Vec::new();
        for path in std::iter::once(first).chain(executed.try_iter()) {
            batch.extend_from_slice(&path);
            batch.push(0);
        }
        if session.wait_stable().is_err() {
            return Ok(());
        }
        file.write_all(&batch)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use lowtide_engine_core::ids::{Life, NodeId};
    use lowtide_engine_core::session::Placement;
    use lowtide_filetree::local::LocalTree;

    use super::*;

    #[test]
    fn a_torn_end_goes_and_the_rest_is_continued() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("journal");
        std::fs::write(&path, b"a/one\0torn").unwrap();
        let placement = Placement {
            meta: vec![NodeId(2)],
            object: vec![NodeId(3)],
        };
        let session = LocalTree::new(placement, Life::default());
        let (sender, receiver) = channel();
        for path in [&b"two"[..], b"caf\xe9/new\nline"] {
            sender.send(path.to_vec()).unwrap();
        }
        drop(sender);
        keep(&session, receiver, open(&path).unwrap()).unwrap();
        let text = std::fs::read(&path).unwrap();
        assert_eq!(text, b"a/one\0two\0caf\xe9/new\nline\0");
        drop(open(&path).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), text);
    }
}
