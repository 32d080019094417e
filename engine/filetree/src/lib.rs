//! A file tree kept on the recovery engine.
