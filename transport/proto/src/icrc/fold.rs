//! The CRC of long pieces for processors whose carry-less multiplication `crc32fast` cannot use, or
//! that have none: without tables, by shifts and XORs of words.
//!
//! A word of a message may be added (XOR) to later ones without changing the CRC, if that adds a
//! multiple of the generator P. `x^300 + x^155 + x^117 + x^89 + 1` is one, the shortest of five terms:
//! so each word is added four times, 145, 183, 211 and 300 bits further on, and is gone. What
//! the last five words have become is left to `crc32fast`. Eight shifts per word, none of which waits for the
//! word before, against eight loads from tables.
//!
//! For 4 KiB in the guest of `ci/guest` (QEMU without hardware virtualization, a crowded host): 1.4 to
//! 1.5 ns per byte, by tables 3.9 to 4.2; by tables on the host itself 0.7 to 0.85, so 0.53 to 0.58.
//!
//! Source: Russell, "Chorba: A novel CRC32 implementation" (2024).

use crc32fast::Hasher;

/// Words that a word is added to end with the fifth behind it.
const AHEAD: usize = 5;
/// Fewer bytes are not worth the beginning and the end of it.
pub(super) const LEN_MIN: usize = 256;

/// Whether `crc32fast` has only tables on this processor.
#[inline]
pub(super) fn is_better() -> bool {
    !has_instructions()
}

#[cfg(all(feature = "std", any(target_arch = "x86", target_arch = "x86_64")))]
#[inline]
fn has_instructions() -> bool {
    std::is_x86_feature_detected!("pclmulqdq")
        && std::is_x86_feature_detected!("sse4.1")
        && std::is_x86_feature_detected!("ssse3")
}

#[cfg(all(feature = "std", target_arch = "aarch64"))]
#[inline]
fn has_instructions() -> bool {
    std::arch::is_aarch64_feature_detected!("crc")
}

#[cfg(not(all(
    feature = "std",
    any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")
)))]
#[inline]
fn has_instructions() -> bool {
    cfg!(any(
        all(
            target_feature = "pclmulqdq",
            target_feature = "sse4.1",
            target_feature = "ssse3"
        ),
        all(target_arch = "aarch64", target_feature = "crc")
    ))
}

/// Adds `bytes`, at least [`LEN_MIN`], to what `hasher` has.
pub(super) fn update(hasher: &mut Hasher, bytes: &[u8]) {
    // The register is added to the first bits of what follows.
    let register = !hasher.clone().finalize();
    let (last, rest) = fold(register, bytes);
    // A register of zero.
    *hasher = Hasher::new_with_initial(!0);
    hasher.update(&last);
    hasher.update(rest);
}

/// What is left of `bytes` before the rest, when words have been added to later ones as long as that
/// goes.
fn fold(register: u32, bytes: &[u8]) -> ([u8; 8 * AHEAD], &[u8]) {
    // What is to be added to the next word and the four behind it.
    let mut sums = [0; AHEAD];
    sums[0] = u64::from(register);
    let len = bytes.len().saturating_sub(8 * AHEAD);
    let (groups, _) = bytes[..len].as_chunks::<{ 8 * AHEAD }>();
    for group in groups {
        let (words, _) = group.as_chunks::<8>();
        for (index, word) in words.iter().enumerate() {
            let word = u64::from_le_bytes(*word) ^ sums[index];
            // Bits go from the lowest on; 145 = 2 * 64 + 17 and so on.
            sums[(index + 2) % AHEAD] ^= word << 17 ^ word << 55;
            sums[(index + 3) % AHEAD] ^= word >> 47 ^ word >> 9 ^ word << 19;
            sums[(index + 4) % AHEAD] ^= word >> 45 ^ word << 44;
            sums[index] = word >> 20;
        }
    }
    let (next, rest) = bytes[groups.len() * 8 * AHEAD..].split_at(8 * AHEAD);
    let mut last = [0; 8 * AHEAD];
    let (words, _) = next.as_chunks::<8>();
    let (into, _) = last.as_chunks_mut::<8>();
    for ((into, word), sum) in into.iter_mut().zip(words).zip(sums) {
        *into = (u64::from_le_bytes(*word) ^ sum).to_le_bytes();
    }
    (last, rest)
}

#[cfg(test)]
mod tests {
    use super::super::multiply_by_x;
    use super::*;

    #[test]
    fn the_polynomial_is_a_multiple_of_the_generator() {
        let power = |n: u32| (0..n).fold(1 << 31, |power, _| multiply_by_x(power));
        let terms = [300, 300 - 145, 300 - 183, 300 - 211, 0];
        assert_eq!(terms.map(power).iter().fold(0, |sum, term| sum ^ term), 0);
    }

    #[test]
    fn pieces_have_the_crc_that_they_have() {
        let mut state = 1_u64;
        let bytes: [u8; 1500] = core::array::from_fn(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        });
        for len in LEN_MIN..bytes.len() {
            let start = len % 9;
            let (before, piece) = bytes[..len].split_at(start);
            let mut ours = Hasher::new();
            ours.update(before);
            let mut other = ours.clone();
            update(&mut ours, piece);
            other.update(piece);
            // What follows goes on from there.
            ours.update(before);
            other.update(before);
            assert_eq!(ours.finalize(), other.finalize(), "{len} bytes");
        }
    }
}
