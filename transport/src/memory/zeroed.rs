//! Words that the system hands out zeroed, and that take no memory until they are touched.

use std::sync::atomic::AtomicU64;

/// `count` words, all zero.
pub(crate) fn zeroed_words(count: usize) -> Box<[AtomicU64]> {
    let words = Box::<[AtomicU64]>::new_zeroed_slice(count);
    // SAFETY: an atomic word is as good as its bytes, and all of them are zero.
    unsafe { words.assume_init() }
}
