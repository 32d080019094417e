//! The raw verbs: ibverbs' meaning exactly, for whoever brings memory of their own.
//!
//! [`types`] is the vocabulary that every provider speaks.

pub mod types;
