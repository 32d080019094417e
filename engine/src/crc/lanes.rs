//! CRC-32C of short stretches by the processor's own instruction, in three lanes.
//!
//! Owns: the loops over the instruction, which gives its result three cycles after it began and can
//! begin every cycle, so that one lane leaves the processor waiting; the constants that put lanes
//! together; the question whether this processor has the instructions.
//! Deliberately absent: long stretches, where wider multiplication wins; other processors than x86-64.
//!
//! Source: Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction" (2011).
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m128i, _mm_clmulepi64_si128, _mm_crc32_u8, _mm_crc32_u32, _mm_crc32_u64, _mm_cvtsi64_si128,
    _mm_cvtsi128_si64, _mm_set_epi64x, _mm_xor_si128,
};

/// Words of a lane, at most.
const LANE: usize = 8;
/// Words that are not worth three lanes.
const FEW: usize = 9;
/// The polynomial, x^31 in the lowest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What moves a lane of so many words over one other lane, and over two.
static SHIFTS: [[i64; 2]; LANE + 1] = {
    let mut shifts = [[0; 2]; LANE + 1];
    let mut words = 1;
    while words <= LANE {
        shifts[words] = [shift(words), shift(2 * words)];
        words += 1;
    }
    shifts
};

/// The factor for so many words of zeros behind: what the multiplication and the reduction add to the
/// power of x is 33.
const fn shift(words: usize) -> i64 {
    let mut factor: u32 = 1 << 31;
    let mut power = 64 * words - 33;
    while power > 0 {
        factor = (factor >> 1) ^ if factor & 1 == 1 { POLYNOMIAL } else { 0 };
        power -= 1;
    }
    factor as i64
}

/// Whether this processor has the instructions.
#[inline]
fn is_able() -> bool {
    is_x86_feature_detected!("sse4.2") && is_x86_feature_detected!("pclmulqdq")
}

/// The state (a checksum before its final complement) after more bytes; `None` if the processor
/// cannot.
#[inline]
pub(super) fn update(state: u32, bytes: &[u8]) -> Option<u32> {
    // SAFETY: the processor has the features that the function is compiled for.
    is_able().then(|| unsafe { of_bytes(state, bytes) })
}

/// As [`update`], of a few words whose number is known; one lane is as good.
#[inline]
pub(super) fn update_words<const N: usize>(state: u32, words: &[[u8; 8]; N]) -> Option<u32> {
    // SAFETY: the processor has the features that the function is compiled for.
    is_able().then(|| unsafe { of_words(u64::from(state), words) } as u32)
}

#[target_feature(enable = "sse4.2,pclmulqdq")]
fn of_bytes(state: u32, bytes: &[u8]) -> u32 {
    let (mut words, rest) = bytes.as_chunks::<8>();
    let mut state = u64::from(state);
    while let Some((block, more)) = words.split_first_chunk::<{ 3 * LANE }>() {
        let (first, others) = block.split_at(LANE);
        let (second, third) = others.split_at(LANE);
        state = of_lanes(state, first, second, third);
        words = more;
    }
    if !words.is_empty() {
        state = of_fewer(state, words);
    }
    if !rest.is_empty() {
        return of_rest(state as u32, rest);
    }
    state as u32
}

/// Less than a block: shorter lanes, and what they leave.
#[inline(never)]
#[target_feature(enable = "sse4.2,pclmulqdq")]
fn of_fewer(state: u64, words: &[[u8; 8]]) -> u64 {
    if words.len() < FEW {
        return of_words(state, words);
    }
    let lane = words.len() / 3;
    let (first, words) = words.split_at(lane);
    let (second, words) = words.split_at(lane);
    let (third, words) = words.split_at(lane);
    of_words(of_lanes(state, first, second, third), words)
}

/// One lane.
#[inline]
#[target_feature(enable = "sse4.2")]
fn of_words(state: u64, words: &[[u8; 8]]) -> u64 {
    let step = |state, word: &[u8; 8]| _mm_crc32_u64(state, u64::from_le_bytes(*word));
    words.iter().fold(state, step)
}

/// Three lanes of the same length, one behind the other.
#[inline]
#[target_feature(enable = "sse4.2,pclmulqdq")]
fn of_lanes(state: u64, first: &[[u8; 8]], second: &[[u8; 8]], third: &[[u8; 8]]) -> u64 {
    let mut lanes = [state, 0, 0];
    for ((a, b), c) in first.iter().zip(second).zip(third) {
        lanes[0] = _mm_crc32_u64(lanes[0], u64::from_le_bytes(*a));
        lanes[1] = _mm_crc32_u64(lanes[1], u64::from_le_bytes(*b));
        lanes[2] = _mm_crc32_u64(lanes[2], u64::from_le_bytes(*c));
    }
    let [over_one, over_two] = SHIFTS[first.len()];
    let factors = _mm_set_epi64x(over_two, over_one);
    let word = |lane: u64| -> __m128i { _mm_cvtsi64_si128(lane as i64) };
    let first = _mm_clmulepi64_si128::<0x10>(word(lanes[0]), factors);
    let second = _mm_clmulepi64_si128::<0x00>(word(lanes[1]), factors);
    let moved = _mm_cvtsi128_si64(_mm_xor_si128(first, second)) as u64;
    _mm_crc32_u64(0, moved) ^ lanes[2]
}

/// Less than a word.
#[inline]
#[target_feature(enable = "sse4.2")]
fn of_rest(mut state: u32, rest: &[u8]) -> u32 {
    let (half, rest) = rest.as_chunks::<4>();
    for half in half {
        state = _mm_crc32_u32(state, u32::from_le_bytes(*half));
    }
    for byte in rest {
        state = _mm_crc32_u8(state, *byte);
    }
    state
}
