//! CRC-32C (Castagnoli), which every record, slot, frame and extent carries.
//!
//! Owns: which library computes it, and the form for bodies in pieces.
//! Deliberately absent: any other checksum; the wire's ICRC is the transport's.

use crc_fast::{CrcAlgorithm, Digest};

/// The checksum of some bytes.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The checksum of the pieces one behind the other.
#[inline]
pub fn crc32c_of_all(pieces: &[&[u8]]) -> u32 {
    if let [bytes] = pieces {
        return crc32c(bytes);
    }
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for piece in pieces {
        digest.update(piece);
    }
    // A CRC of 32 bits stands in the lower half.
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, B.4: the vectors of iSCSI, whole and in pieces.
    #[test]
    fn the_published_vectors_come_out_however_the_bytes_are_cut() {
        let rising: Vec<u8> = (0..32).collect();
        let falling: Vec<u8> = (0..32).rev().collect();
        let vectors: [(&[u8], u32); 5] = [
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&rising, 0x46dd_794e),
            (&falling, 0x113f_db5c),
            (b"123456789", 0xe306_9283),
        ];
        for (bytes, expected) in vectors {
            assert_eq!(crc32c(bytes), expected);
            for cut in 0..=bytes.len() {
                let (head, tail) = bytes.split_at(cut);
                assert_eq!(crc32c_of_all(&[head, &[], tail]), expected, "cut at {cut}");
            }
        }
        assert_eq!(crc32c_of_all(&[]), 0);
    }
}
