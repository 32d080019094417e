//! Why an operation on a file tree did not happen.

use std::io;

use lowtide_engine_core::ids::{Life, NodeId};
use lowtide_engine_core::op::{Key, Refusal};
use lowtide_engine_core::session::SessionError;

use crate::layout::Malformed;

/// Why an operation on a file tree did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// No such name or inode.
    #[error("not found")]
    NotFound,
    /// The name is taken.
    #[error("exists already")]
    Exists,
    /// The directory has entries.
    #[error("directory not empty")]
    NotEmpty,
    /// Something else stands where a directory is needed.
    #[error("not a directory")]
    NotADirectory,
    /// A directory stands where it must not.
    #[error("is a directory")]
    IsADirectory,
    /// The operation is for regular files only.
    #[error("not a regular file")]
    NotAFile,
    /// A name that no entry can have: empty, too long, `.`, `..`, or with `/` or NUL.
    #[error("invalid name")]
    InvalidName,
    /// A symbolic link's target is empty, too long or contains NUL.
    #[error("invalid target of a symbolic link")]
    InvalidTarget,
    /// An attribute is out of range (mode above 07777, nanoseconds above a second …).
    #[error("invalid attribute")]
    InvalidAttribute,
    /// A directory would become its own descendant.
    #[error("a directory cannot move into itself")]
    IntoItself,
    /// Writing would begin beyond the end of the file.
    #[error("offset beyond the end of the file")]
    BeyondEnd,
    /// This session has handed out all inode numbers of its life.
    #[error("this session has no inode numbers left")]
    InodesExhausted,
    /// The session's node number or incarnation does not fit an inode number.
    #[error("life {life} does not fit an inode number")]
    LifeTooLarge {
        /// The session's life.
        life: Life,
    },
    /// The cluster has no metadata or no object server.
    #[error("no servers to place the tree on")]
    NoServers,
    /// Others changed the same objects again and again.
    #[error("gave up after many conflicting changes by others")]
    Contended,
    /// A stored object is not what it should be.
    #[error("corrupt object {key:?} on {home}: {why}")]
    Corrupt {
        /// Server that keeps the object.
        home: NodeId,
        /// The object.
        key: Key,
        /// What is wrong with it.
        why: Malformed,
    },
    /// The contents to be written could not be read.
    #[error("cannot read the input: {0}")]
    Input(#[source] io::Error),
    /// The session failed or refused for a reason that is not the tree's.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl TreeError {
    /// Whether a check of the operation did not hold, so that what it was planned on has changed.
    pub(crate) fn is_check_failed(&self) -> bool {
        matches!(
            self,
            TreeError::Session(SessionError::Refused(Refusal::CheckFailed { .. }))
        )
    }
}
