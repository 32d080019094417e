//! Commands of a user on names of the tree: put, get, ls, mkdir, mv, ln, rm.
//!
//! Names in the tree are absolute; a leading `/` may be left out, `..` and symbolic links are not
//! followed. A command that changes anything returns once the change is *stable*.

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use lowtide_engine_core::session::Session;
use lowtide_filetree::fetch::{self, FetchOptions};
use lowtide_filetree::layout::{Attributes, Entry, Ino, Kind};
use lowtide_filetree::store::{self, StoreOptions};
use lowtide_filetree::tree::{DirEntry, Stat, Tree};
use lowtide_filetree::{Progress, TreeError};

use crate::control::{FileJob, RawPath};
use crate::jobs::words;

/// Entries of a directory read at a time.
const PAGE_ENTRIES: usize = 4096;

/// Does one command and returns what it prints.
///
/// # Errors
/// Why it was not done, for people; the path is part of it.
pub fn execute<S: Session + ?Sized>(
    tree: &Tree<'_, S>,
    job: &FileJob,
    progress: &Progress,
) -> Result<Vec<String>, String> {
    let files = Files { tree, progress };
    let lines = match job {
        FileJob::Put { from, to } => files.put(&from.0, to)?,
        FileJob::Get { from, to } => files.get(from, &to.0)?,
        // Reads only: nothing to become stable.
        FileJob::Ls { path, long } => return files.ls(path, *long),
        FileJob::Mkdir { path, parents } => files.mkdir(path, *parents)?,
        FileJob::Mv { from, to } => files.mv(from, to)?,
        FileJob::Ln {
            target,
            name,
            symbolic,
        } => files.ln(target, name, *symbolic)?,
        FileJob::Rm { path, recursive } => files.rm(path, *recursive)?,
    };
    tree.session().wait_stable().map_err(words)?;
    Ok(lines)
}

struct Files<'r, 's, S: Session + ?Sized> {
    tree: &'r Tree<'s, S>,
    progress: &'r Progress,
}

/// What a command prints, or why it was not done.
type Answer = Result<Vec<String>, String>;

impl<S: Session + ?Sized> Files<'_, '_, S> {
    fn put(&self, from: &Path, to: &RawPath) -> Answer {
        let metadata = fs::symlink_metadata(from).map_err(|e| said(from, &e))?;
        let (directory, name) = self.place(to)?;
        let attributes = attributes(&metadata);
        let kind = metadata.file_type();
        if kind.is_dir() {
            let ino = self
                .tree
                .mkdir(directory, name, &attributes)
                .map_err(|e| failed(to, &e))?;
            let options = StoreOptions {
                into: ino,
                ..StoreOptions::default()
            };
            let report = store::store(self.tree, from, &options, self.progress).map_err(words)?;
            if let Some(first) = report.unreadable.list.first() {
                let count = report.unreadable.count;
                return Err(format!(
                    "stored, but {count} entries cannot be read: {first}"
                ));
            }
            return Ok(vec![format!(
                "{} files, {} directories, {} symbolic links, {} bytes",
                report.files,
                report.directories + 1,
                report.symlinks,
                report.bytes
            )]);
        }
        if kind.is_symlink() {
            let target = fs::read_link(from).map_err(|e| said(from, &e))?;
            self.tree
                .symlink(directory, name, target.as_os_str().as_bytes(), &attributes)
        } else if kind.is_file() {
            let mut file = BufReader::new(File::open(from).map_err(|e| said(from, &e))?);
            self.tree.create(directory, name, &attributes, &mut file)
        } else {
            return Err(format!(
                "{}: neither a file, a directory nor a symbolic link",
                from.display()
            ));
        }
        .map_err(|e| failed(to, &e))?;
        Ok(Vec::new())
    }

    fn get(&self, from: &RawPath, to: &Path) -> Answer {
        let entry = self.find(from)?;
        if fs::symlink_metadata(to).is_ok() {
            return Err(format!("{}: exists already", to.display()));
        }
        match entry.kind {
            Kind::Directory => {
                let options = FetchOptions {
                    from: entry.ino,
                    ..FetchOptions::default()
                };
                let report = fetch::fetch(self.tree, to, &options, self.progress).map_err(words)?;
                if let Some(first) = report.damaged.list.first() {
                    let count = report.damaged.count;
                    return Err(format!("{count} entries are damaged: {first}"));
                }
                Ok(vec![format!(
                    "{} files, {} directories, {} symbolic links, {} bytes",
                    report.files, report.directories, report.symlinks, report.bytes
                )])
            }
            Kind::Symlink => {
                let stat = self.stat(from, entry.ino)?;
                let target = std::ffi::OsStr::from_bytes(&stat.inode.target);
                symlink(target, to).map_err(|e| said(to, &e))?;
                Ok(Vec::new())
            }
            Kind::File => self.get_file(from, entry.ino, to),
        }
    }

    fn get_file(&self, from: &RawPath, ino: Ino, to: &Path) -> Answer {
        let stat = self.stat(from, ino)?;
        let mut reader = self.tree.read(ino).map_err(|e| failed(from, &e))?;
        let mut file = File::create_new(to).map_err(|e| said(to, &e))?;
        let time = mtime(&stat);
        let written = io::copy(&mut reader, &mut file)
            .and_then(|_| {
                let mode = u32::from(stat.inode.attributes.mode);
                file.set_permissions(fs::Permissions::from_mode(mode))
            })
            .and_then(|()| time.map_or(Ok(()), |time| file.set_modified(time)));
        if let Err(error) = written {
            // A part of a file is no file.
            let _ = fs::remove_file(to);
            return Err(said(to, &error));
        }
        Ok(Vec::new())
    }

    fn ls(&self, path: &RawPath, long: bool) -> Answer {
        let entry = self.find(path)?;
        let mut entries = Vec::new();
        if entry.kind == Kind::Directory {
            let mut cursor = None;
            loop {
                let page = self
                    .tree
                    .readdir(entry.ino, cursor.as_ref(), PAGE_ENTRIES)
                    .map_err(|e| failed(path, &e))?;
                entries.extend(page.entries);
                cursor = page.next;
                if cursor.is_none() {
                    break;
                }
            }
        } else {
            let name = path.0.file_name().unwrap_or_default().as_bytes().to_vec();
            entries.push(DirEntry { name, entry });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        if !long {
            return Ok(entries.iter().map(|e| printable(&e.name)).collect());
        }
        entries
            .iter()
            .map(|e| Ok(long_line(e, &self.stat(path, e.entry.ino)?)))
            .collect()
    }

    fn mkdir(&self, path: &RawPath, parents: bool) -> Answer {
        let attributes = Attributes {
            mode: 0o755,
            ..now()
        };
        if !parents {
            let (directory, name) = self.place(path)?;
            self.tree
                .mkdir(directory, name, &attributes)
                .map_err(|e| failed(path, &e))?;
            return Ok(Vec::new());
        }
        let mut at = Ino::ROOT;
        for name in names(path) {
            let made = match self.tree.mkdir(at, name, &attributes) {
                Err(TreeError::Exists) => self.tree.lookup(at, name).and_then(|e| match e.kind {
                    Kind::Directory => Ok(e.ino),
                    _ => Err(TreeError::NotADirectory),
                }),
                made => made,
            };
            at = made.map_err(|e| failed(path, &e))?;
        }
        Ok(Vec::new())
    }

    fn mv(&self, from: &RawPath, to: &RawPath) -> Answer {
        let source = self.place(from)?;
        let target = self.place(to)?;
        self.tree
            .rename(source, target)
            .map_err(|e| format!("{} -> {}", from.0.display(), failed(to, &e)))?;
        Ok(Vec::new())
    }

    fn ln(&self, target: &RawPath, name: &RawPath, symbolic: bool) -> Answer {
        let (directory, new) = self.place(name)?;
        if symbolic {
            let attributes = Attributes {
                mode: 0o777,
                ..now()
            };
            let text = target.0.as_os_str().as_bytes();
            self.tree
                .symlink(directory, new, text, &attributes)
                .map_err(|e| failed(name, &e))?;
        } else {
            let ino = self.find(target)?.ino;
            self.tree
                .link(ino, directory, new)
                .map_err(|e| failed(name, &e))?;
        }
        Ok(Vec::new())
    }

    fn rm(&self, path: &RawPath, recursive: bool) -> Answer {
        let (directory, name) = self.place(path)?;
        if recursive {
            self.tree.remove_all(directory, name)
        } else {
            self.tree.unlink(directory, name)
        }
        .map_err(|e| failed(path, &e))?;
        Ok(Vec::new())
    }

    fn find(&self, path: &RawPath) -> Result<Entry, String> {
        self.tree
            .resolve(path.0.as_os_str().as_bytes())
            .map_err(|e| failed(path, &e))
    }

    fn stat(&self, path: &RawPath, ino: Ino) -> Result<Stat, String> {
        self.tree.stat(ino).map_err(|e| failed(path, &e))
    }

    /// The directory that a path lies in, and its last name.
    fn place<'p>(&self, path: &'p RawPath) -> Result<(Ino, &'p [u8]), String> {
        let mut names: Vec<&[u8]> = names(path).collect();
        let name = names
            .pop()
            .ok_or_else(|| format!("{}: the root itself", path.0.display()))?;
        let parent = self
            .tree
            .resolve(&names.join(&b'/'))
            .map_err(|e| failed(path, &e))?;
        Ok((parent.ino, name))
    }
}

/// The names of a path; `.` and empty parts are none.
fn names(path: &RawPath) -> impl Iterator<Item = &[u8]> {
    path.0
        .as_os_str()
        .as_bytes()
        .split(|b| *b == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
}

fn attributes(metadata: &fs::Metadata) -> Attributes {
    Attributes {
        mode: (metadata.mode() & 0o7777) as u16,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime_sec: metadata.mtime(),
        mtime_nsec: metadata.mtime_nsec() as u32,
    }
}

/// Attributes of something made now by whoever runs this.
fn now() -> Attributes {
    let time = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    Attributes {
        mode: 0,
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        mtime_sec: time.as_secs() as i64,
        mtime_nsec: time.subsec_nanos(),
    }
}

/// The modification time, unless it lies before 1970.
fn mtime(stat: &Stat) -> Option<std::time::SystemTime> {
    let attributes = &stat.inode.attributes;
    let seconds = u64::try_from(attributes.mtime_sec).ok()?;
    std::time::UNIX_EPOCH.checked_add(std::time::Duration::new(seconds, attributes.mtime_nsec))
}

fn long_line(entry: &DirEntry, stat: &Stat) -> String {
    let kind = match entry.entry.kind {
        Kind::Directory => 'd',
        Kind::Symlink => 'l',
        Kind::File => '-',
    };
    let attributes = &stat.inode.attributes;
    let permissions: String = (0..9)
        .map(|bit| match attributes.mode >> (8 - bit) & 1 {
            0 => '-',
            _ => ['r', 'w', 'x'][bit % 3],
        })
        .collect();
    let mut line = format!(
        "{kind}{permissions} {:>3} {:>5} {:>5} {:>12} {:>10} {}",
        stat.count,
        attributes.uid,
        attributes.gid,
        stat.inode.size,
        attributes.mtime_sec,
        printable(&entry.name),
    );
    if entry.entry.kind == Kind::Symlink {
        line += " -> ";
        line += &printable(&stat.inode.target);
    }
    line
}

/// A name for a terminal: control characters and what is not UTF-8 escaped.
fn printable(name: &[u8]) -> String {
    let mut text = String::new();
    for part in name.utf8_chunks() {
        for c in part.valid().chars() {
            match c.is_control() {
                true => text.extend(c.escape_default()),
                false => text.push(c),
            }
        }
        for byte in part.invalid() {
            text += &format!("\\x{byte:02x}");
        }
    }
    text
}

fn failed(path: &RawPath, error: &TreeError) -> String {
    format!("{}: {error}", path.0.display())
}

fn said(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use lowtide_engine_core::ids::{Incarnation, Life, NodeId};
    use lowtide_engine_core::session::Placement;
    use lowtide_filetree::local::LocalTree;

    use super::*;

    fn session() -> LocalTree {
        let placement = Placement {
            meta: vec![NodeId(2), NodeId(3)],
            object: vec![NodeId(4)],
        };
        let life = Life {
            node: NodeId(9),
            incarnation: Incarnation(1),
        };
        LocalTree::new(placement, life)
    }

    fn raw(path: &str) -> RawPath {
        RawPath(path.into())
    }

    fn ls(tree: &Tree<'_, LocalTree>, path: &str) -> Vec<String> {
        let job = FileJob::Ls {
            path: raw(path),
            long: false,
        };
        execute(tree, &job, &Progress::default()).unwrap()
    }

    #[test]
    fn what_is_put_is_listed_renamed_linked_fetched_and_removed() {
        let session = session();
        let tree = Tree::open(&session).unwrap();
        let tmp = tempfile::tempdir().unwrap();
        let local = tmp.path().join("in");
        fs::create_dir_all(local.join("sub")).unwrap();
        fs::write(local.join("sub/a"), "hello").unwrap();
        fs::set_permissions(local.join("sub/a"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("a", local.join("sub/s")).unwrap();
        let run = |job: FileJob| execute(&tree, &job, &Progress::default());

        let mkdir = |path: &str, parents| FileJob::Mkdir {
            path: raw(path),
            parents,
        };
        run(mkdir("/x/y", true)).unwrap();
        run(mkdir("x/y", true)).unwrap();
        assert!(run(mkdir("/x", false)).unwrap_err().contains("/x: exists"));
        let put = FileJob::Put {
            from: RawPath(local.clone()),
            to: raw("/x/y/in"),
        };
        let told = run(put.clone()).unwrap();
        assert_eq!(told, ["1 files, 2 directories, 1 symbolic links, 5 bytes"]);
        assert!(run(put).unwrap_err().contains("exists"));
        assert_eq!(ls(&tree, "/x/y/in/sub"), ["a", "s"]);

        run(FileJob::Mv {
            from: raw("/x/y/in"),
            to: raw("/z"),
        })
        .unwrap();
        run(FileJob::Ln {
            target: raw("/z/sub/a"),
            name: raw("/b"),
            symbolic: false,
        })
        .unwrap();
        let long = run(FileJob::Ls {
            path: raw("/b"),
            long: true,
        })
        .unwrap();
        assert!(long[0].starts_with("-rw-r-----   2 "), "{long:?}");

        let out = tmp.path().join("out");
        let get = |from: &str, to: &str| FileJob::Get {
            from: raw(from),
            to: RawPath(tmp.path().join(to)),
        };
        run(get("/z", "out")).unwrap();
        assert_eq!(fs::read(out.join("sub/a")).unwrap(), b"hello");
        assert_eq!(fs::read_link(out.join("sub/s")).unwrap(), Path::new("a"));
        run(get("/b", "b")).unwrap();
        let metadata = fs::metadata(tmp.path().join("b")).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o640);
        let original = fs::metadata(local.join("sub/a")).unwrap();
        assert_eq!(metadata.modified().unwrap(), original.modified().unwrap());
        assert!(run(get("/b", "b")).unwrap_err().contains("exists already"));

        let rm = |path: &str, recursive| FileJob::Rm {
            path: raw(path),
            recursive,
        };
        assert!(run(rm("/z", false)).unwrap_err().contains("directory"));
        run(rm("/z", true)).unwrap();
        run(rm("/b", false)).unwrap();
        assert_eq!(ls(&tree, "/"), ["x"]);
        assert!(run(rm("/", true)).unwrap_err().contains("root itself"));
        assert!(
            run(get("/nope", "n"))
                .unwrap_err()
                .contains("/nope: not found")
        );
    }

    #[test]
    fn names_cannot_play_with_the_terminal() {
        assert_eq!(printable(b"a\x1b[2J\xff"), "a\\u{1b}[2J\\xff");
        assert_eq!(printable("h\u{fc}".as_bytes()), "h\u{fc}");
    }
}
