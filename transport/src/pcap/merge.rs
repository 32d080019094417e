//! One capture file out of those that several devices wrote.
//!
//! Owns the rule by which a packet is in the result once: as sent, if its sender wrote a file too;
//! as received otherwise. So packets that were lost on the way are there, and each is shown by the
//! one who knows its Identification for certain.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::read::{Frame, ReadError, Reader};

/// A file that a device wrote.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The device's address.
    pub owner: SocketAddr,
    /// The file.
    pub path: PathBuf,
}

/// What became of a merge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Packets in the result.
    pub packets: u64,
    /// Files whose end is missing, since their writers were killed, or that cannot be read.
    pub incomplete: Vec<(PathBuf, String)>,
}

struct Source {
    piece: Piece,
    reader: Reader<BufReader<File>>,
    /// The next frame that belongs into the result.
    next: Frame,
}

/// Merges `pieces` into the file `out`, by time.
///
/// # Errors
/// `out` cannot be written. A piece that cannot be read (on) is in [`Merged::incomplete`].
pub fn merge(pieces: Vec<Piece>, out: &Path) -> io::Result<Merged> {
    let mut out = BufWriter::new(File::create(out)?);
    super::write_head(&mut out)?;
    let owners: HashSet<SocketAddr> = pieces.iter().map(|piece| piece.owner).collect();
    let mut merged = Merged::default();
    let mut sources = Vec::new();
    for piece in pieces {
        let reader = File::open(&piece.path)
            .map_err(ReadError::Io)
            .and_then(|file| Reader::new(BufReader::new(file)));
        match reader {
            Ok(reader) => sources.extend(advance(piece, reader, &owners, &mut merged)),
            Err(error) => merged.incomplete.push((piece.path, error.to_string())),
        }
    }
    let time = |source: &Source| (source.next.seconds, source.next.nanos);
    while let Some(first) = (0..sources.len()).min_by_key(|&i| time(&sources[i])) {
        let source = sources.swap_remove(first);
        write(&mut out, &source.next)?;
        merged.packets += 1;
        sources.extend(advance(source.piece, source.reader, &owners, &mut merged));
    }
    out.flush()?;
    Ok(merged)
}

/// Goes to the next frame of the result; none at the end.
fn advance(
    piece: Piece,
    mut reader: Reader<BufReader<File>>,
    owners: &HashSet<SocketAddr>,
    merged: &mut Merged,
) -> Option<Source> {
    loop {
        match reader.next_frame() {
            Ok(Some(next)) => {
                let sender = next.datagram().ok()?.source;
                if sender == piece.owner || !owners.contains(&sender) {
                    return Some(Source {
                        piece,
                        reader,
                        next,
                    });
                }
            }
            Ok(None) => return None,
            Err(error) => {
                merged.incomplete.push((piece.path, error.to_string()));
                return None;
            }
        }
    }
}

fn write(out: &mut impl Write, frame: &Frame) -> io::Result<()> {
    let len = frame.bytes.len() as u32;
    for word in [
        frame.seconds as u32,
        frame.nanos / 1000,
        len,
        frame.wire_len,
    ] {
        out.write_all(&word.to_le_bytes())?;
    }
    out.write_all(&frame.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_packet_is_there_once_and_in_order_though_a_writer_was_killed() {
        let dir = std::env::temp_dir().join(format!("lowtide-merge-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let [a, b, kernel]: [SocketAddr; 3] =
            ["10.0.0.1:4791", "10.0.0.2:4791", "10.0.0.3:49152"].map(|s| s.parse().unwrap());
        let sent = [
            (a, b, 1),
            (b, a, 2),
            (a, b, 3),
            (kernel, a, 4),
            (a, kernel, 5),
        ];
        let pieces = [a, b].map(|owner| {
            let mut bytes = Vec::new();
            super::super::write_head(&mut bytes).unwrap();
            for &(source, target, n) in sent.iter().filter(|s| s.0 == owner || s.1 == owner) {
                // The third is lost on the way.
                if n != 3 || owner == source {
                    let frame = Frame {
                        number: 0,
                        seconds: n.into(),
                        nanos: 0,
                        link: 101,
                        wire_len: 0,
                        bytes: {
                            let mut one = Vec::new();
                            super::super::write(&mut one, source, target, 0, &[&[n; 4]]).unwrap();
                            one.split_off(16)
                        },
                    };
                    write(&mut bytes, &frame).unwrap();
                }
            }
            let path = dir.join(owner.to_string());
            if owner == b {
                // Killed in the middle of what it received.
                bytes.extend([0; 9]);
            }
            std::fs::write(&path, bytes).unwrap();
            Piece { owner, path }
        });
        let out = dir.join("merged");
        let merged = merge(pieces.to_vec(), &out).unwrap();
        assert_eq!(merged.packets, 5);
        assert_eq!(merged.incomplete.len(), 1);
        assert!(merged.incomplete[0].1.contains("ends in the middle"));
        let mut reader = Reader::new(File::open(&out).unwrap()).unwrap();
        for (source, target, n) in sent {
            let frame = reader.next_frame().unwrap().unwrap();
            let datagram = frame.datagram().unwrap();
            assert_eq!((datagram.source, datagram.target), (source, target));
            assert_eq!((frame.seconds, datagram.payload), (n.into(), &[n; 4][..]));
        }
        assert_eq!(reader.next_frame().unwrap(), None);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
