//! How a node process takes orders from its own machine: JSON lines over a Unix socket.
//!
//! One line asks, one line answers; a connection may ask often. Long work (a *job*) is only
//! started by an order; its progress and outcome are part of the node's report, so that whoever
//! started it may lose the connection, or never ask again, without harm.
//!
//! Deliberately absent: the engine. The node process supplies a handler; this module never
//! learns what an epoch is. Access control is that of the file system: whoever may write to the
//! socket may give orders.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::engine::Status;

/// Longest line in either direction, in bytes. A listing of a large directory is the largest.
const LINE_MAX: u64 = 64 << 20;
/// Longest time an order may take; orders only start work, they do not wait for it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What a node is asked to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Report.
    Report,
    /// Drop, or no longer drop, every datagram to and from a peer.
    Block {
        /// Number of the peer.
        peer: u32,
        /// Drop or not.
        blocked: bool,
    },
    /// To the root: a process is known to be dead and will not come back.
    Gone {
        /// Number of the dead node.
        node: u32,
    },
    /// Start a job (clients only).
    Start {
        /// The job.
        job: Job,
    },
    /// Forget a job whose outcome was read.
    Forget {
        /// Number of the job.
        job: u64,
    },
    /// End in good order.
    Stop,
}

/// What a node answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Order::Report`].
    Report(Box<NodeReport>),
    /// To [`Order::Start`].
    Started {
        /// Number of the job, unique within this life of the node.
        job: u64,
    },
    /// The order was carried out.
    Done,
    /// The order makes no sense here.
    Refused {
        /// Why.
        reason: String,
    },
}

/// How a node is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The engine's view.
    pub status: Status,
    /// Jobs that were started and not yet forgotten.
    pub jobs: Vec<JobReport>,
}

/// Work on the file tree, done by a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub enum Job {
    /// Store one share of a local directory as the tree's root directory.
    Store {
        /// The directory.
        input: RawPath,
        /// Which share, from 0.
        share: u32,
        /// Of how many.
        shares: u32,
        /// Where to write down what is stable ([`crate::journal`]).
        #[serde(default)]
        journal: Option<RawPath>,
    },
    /// Read the whole tree back and compare it with a local directory, and check it by itself.
    Verify {
        /// The directory.
        input: RawPath,
        /// When the run began, in seconds since 1970: what changed later is no mismatch.
        since: u64,
    },
    /// One command on names.
    Files(FileJob),
}

/// A single command of a user on the tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum FileJob {
    /// Store a local file or directory under a name.
    Put {
        /// What.
        from: RawPath,
        /// Name in the tree.
        to: RawPath,
    },
    /// Write a file or directory of the tree to a local path.
    Get {
        /// Name in the tree.
        from: RawPath,
        /// Where.
        to: RawPath,
    },
    /// List a directory, or one name.
    Ls {
        /// Name in the tree.
        path: RawPath,
        /// With kind, permissions, links, size and time.
        long: bool,
    },
    /// Make a directory.
    Mkdir {
        /// Name in the tree.
        path: RawPath,
        /// Also missing parents; an existing directory is no error.
        parents: bool,
    },
    /// Rename.
    Mv {
        /// Name in the tree.
        from: RawPath,
        /// New name in the tree.
        to: RawPath,
    },
    /// Another name for a file.
    Ln {
        /// Name in the tree.
        target: RawPath,
        /// New name in the tree.
        name: RawPath,
        /// A symbolic link instead of a hard one.
        symbolic: bool,
    },
    /// Remove a name.
    Rm {
        /// Name in the tree.
        path: RawPath,
        /// A directory and everything in it.
        recursive: bool,
    },
}

/// A job and how far it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobReport {
    /// Number of the job.
    pub id: u64,
    /// How far it is.
    pub progress: Progress,
    /// Its end, once it has ended.
    pub outcome: Option<Outcome>,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Entries done.
    pub entries: u64,
    /// Bytes of contents done.
    pub bytes: u64,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// All of a share is stored and stable.
    Stored {
        /// How much of the input could not be read.
        unreadable_count: u64,
        /// Input that could not be read, each with its reason; the first hundred.
        unreadable: Vec<String>,
        /// Input that was skipped on purpose (sockets, devices), each with its kind.
        skipped: Vec<String>,
        /// Input that vanished or never held still.
        changed: Vec<String>,
    },
    /// The tree was compared.
    Verified {
        /// Entries compared.
        entries: u64,
        /// Bytes compared.
        bytes: u64,
        /// Number of differences.
        mismatches: u64,
        /// Operations found half done.
        partial_operations: u64,
        /// The differences in words, the first hundred.
        problems: Vec<String>,
        /// Input that changed since the run began.
        changed: Vec<String>,
    },
    /// A command succeeded; what it prints.
    Output {
        /// Lines for the user; names that are not UTF-8 are escaped.
        lines: Vec<String>,
    },
    /// The job could not be done.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A path that need not be UTF-8: a JSON string where it is, an array of bytes where not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawPath(pub PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RawPathForm {
    Text(String),
    Bytes(Vec<u8>),
}

impl Serialize for RawPath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => RawPathForm::Text(text.to_owned()),
            None => RawPathForm::Bytes(self.0.as_os_str().as_bytes().to_vec()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RawPath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<RawPath, D::Error> {
        Ok(RawPath(match RawPathForm::deserialize(deserializer)? {
            RawPathForm::Text(text) => PathBuf::from(text),
            RawPathForm::Bytes(bytes) => PathBuf::from(OsString::from_vec(bytes)),
        }))
    }
}

impl From<&Path> for RawPath {
    fn from(path: &Path) -> RawPath {
        RawPath(path.to_owned())
    }
}

/// Why an order was not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Nobody listens, or the connection broke, or no answer came in time.
    #[error("{}: {error}", socket.display())]
    Io {
        /// The socket.
        socket: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// The node refused.
    #[error("refused: {reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// The node answered something else.
    #[error("{}: unexpected answer", socket.display())]
    Unexpected {
        /// The socket.
        socket: PathBuf,
    },
}

/// A connection to a node.
#[derive(Debug)]
pub struct Control {
    socket: PathBuf,
    reader: BufReader<UnixStream>,
}

impl Control {
    /// Connects to a node's socket.
    ///
    /// # Errors
    /// [`ControlError::Io`] when nobody listens there.
    pub fn connect(socket: &Path) -> Result<Control, ControlError> {
        let open = || {
            let stream = with_short_path(socket, |path| UnixStream::connect(path))?;
            stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
            stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
            Ok(stream)
        };
        match open() {
            Ok(stream) => Ok(Control {
                socket: socket.to_owned(),
                reader: BufReader::new(stream),
            }),
            Err(error) => Err(ControlError::Io {
                socket: socket.to_owned(),
                error,
            }),
        }
    }

    /// Gives an order and waits for the answer. After an error the connection is of no more use.
    ///
    /// # Errors
    /// [`ControlError`]; a refusal is an error too.
    pub fn ask(&mut self, order: &Order) -> Result<Answer, ControlError> {
        let exchange = |reader: &mut BufReader<UnixStream>| {
            write_line(reader.get_mut(), order)?;
            read_line(reader)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        };
        match exchange(&mut self.reader) {
            Ok(Answer::Refused { reason }) => Err(ControlError::Refused { reason }),
            Ok(answer) => Ok(answer),
            Err(error) => Err(ControlError::Io {
                socket: self.socket.clone(),
                error,
            }),
        }
    }

    /// Asks for the node's report.
    ///
    /// # Errors
    /// [`ControlError`]
    pub fn report(&mut self) -> Result<NodeReport, ControlError> {
        match self.ask(&Order::Report)? {
            Answer::Report(report) => Ok(*report),
            _ => Err(ControlError::Unexpected {
                socket: self.socket.clone(),
            }),
        }
    }

    /// Starts a job and returns its number.
    ///
    /// # Errors
    /// [`ControlError`]
    pub fn start(&mut self, job: Job) -> Result<u64, ControlError> {
        match self.ask(&Order::Start { job })? {
            Answer::Started { job } => Ok(job),
            _ => Err(ControlError::Unexpected {
                socket: self.socket.clone(),
            }),
        }
    }
}

/// Carries out orders.
pub type Handler = dyn Fn(Order) -> Answer + Send + Sync;

/// Takes orders on a socket until it is dropped.
#[derive(Debug)]
pub struct Server {
    socket: PathBuf,
    stopping: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Listens on `socket`, replacing what an earlier life left there. Each connection has a
    /// thread; orders of different connections are carried out at the same time.
    ///
    /// # Errors
    /// The socket cannot be made; `AlreadyExists` where something else lies, which is left alone.
    pub fn start(socket: &Path, handler: Arc<Handler>) -> io::Result<Server> {
        match std::fs::symlink_metadata(socket) {
            Ok(found) if found.file_type().is_socket() => std::fs::remove_file(socket)?,
            Ok(_) => {
                let words = "something else than a socket is there";
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, words));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) => {}
        }
        let listener = with_short_path(socket, |path| UnixListener::bind(path))?;
        let stopping = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stopping);
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept_loop(&listener, &handler, &flag))?;
        Ok(Server {
            socket: socket.to_owned(),
            stopping,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Pairs with the load in `accept_loop`; the connection below orders the two.
        self.stopping.store(true, Ordering::SeqCst);
        let woken = with_short_path(&self.socket, |path| UnixStream::connect(path));
        let _ = std::fs::remove_file(&self.socket);
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

fn accept_loop(listener: &UnixListener, handler: &Arc<Handler>, stopping: &AtomicBool) {
    for stream in listener.incoming() {
        if stopping.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else {
            // Out of descriptors: the peer will try again, and so do we, at leisure.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        let handler = Arc::clone(handler);
        let spawned = std::thread::Builder::new()
            .name("orders".to_owned())
            .spawn(move || {
                if let Err(error) = answer_loop(&stream, &*handler) {
                    tracing::debug!(%error, "control connection ended");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "control connection refused");
        }
    }
}

fn answer_loop(stream: &UnixStream, handler: &Handler) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let answer = match read_line::<Order>(&mut reader) {
            Ok(None) => return Ok(()),
            Ok(Some(order)) => handler(order),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Answer::Refused {
                reason: error.to_string(),
            },
            Err(error) => return Err(error),
        };
        write_line(&mut &*stream, &answer)?;
    }
}

fn write_line<T: Serialize>(out: &mut impl Write, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    out.write_all(&line)
}

/// One value, or `None` at the end of the stream.
fn read_line<T: DeserializeOwned>(reader: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    reader.take(LINE_MAX).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Unix socket addresses hold about 100 bytes, state directories may be longer: goes through an
/// open descriptor of the directory, whose name under /proc is short.
fn with_short_path<T>(socket: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let dir = socket.parent().filter(|p| !p.as_os_str().is_empty());
    let dir = File::open(dir.unwrap_or(Path::new(".")))?;
    let name = socket.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    act(&Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(socket: &Path) -> Server {
        Server::start(
            socket,
            Arc::new(|order| match order {
                Order::Report => Answer::Report(Box::default()),
                Order::Start { .. } => Answer::Started { job: 7 },
                Order::Stop => Answer::Refused {
                    reason: "not now".to_owned(),
                },
                _ => Answer::Done,
            }),
        )
        .unwrap()
    }

    #[test]
    fn a_file_where_the_socket_should_be_is_left_alone() {
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("precious");
        std::fs::write(&file, "mine").unwrap();
        let error = Server::start(&file, Arc::new(|_| Answer::Done)).err();
        assert_eq!(error.unwrap().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    }

    #[test]
    fn orders_are_answered_on_a_socket_with_a_very_long_path() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("d".repeat(200));
        std::fs::create_dir(&dir).unwrap();
        let socket = dir.join("control.sock");
        let first = server(&socket);
        let mut control = Control::connect(&socket).unwrap();
        assert_eq!(control.report().unwrap(), NodeReport::default());
        let job = Job::Files(FileJob::Ls {
            path: RawPath(OsString::from_vec(b"/caf\xe9".to_vec()).into()),
            long: true,
        });
        assert_eq!(control.start(job).unwrap(), 7);
        let refused = control.ask(&Order::Stop).unwrap_err();
        assert!(refused.to_string().contains("not now"));
        drop(first);
        assert!(matches!(
            Control::connect(&socket),
            Err(ControlError::Io { .. })
        ));
    }

    #[test]
    fn a_new_life_takes_over_the_socket_of_a_dead_one() {
        let tmp = tempfile::tempdir().unwrap();
        let socket = tmp.path().join("control.sock");
        drop(UnixListener::bind(&socket).unwrap());
        assert!(socket.exists());
        let _server = server(&socket);
        Control::connect(&socket).unwrap().report().unwrap();
    }

    #[test]
    fn nonsense_is_refused_and_the_connection_lives_on() {
        let tmp = tempfile::tempdir().unwrap();
        let socket = tmp.path().join("control.sock");
        let _server = server(&socket);
        let mut reader = BufReader::new(UnixStream::connect(&socket).unwrap());
        for line in [
            "\n",
            "{]\n",
            "{\"order\":\"dance\"}\n",
            "{\"order\":\"block\"}\n",
        ] {
            reader.get_mut().write_all(line.as_bytes()).unwrap();
            let answer: Answer = read_line(&mut reader).unwrap().unwrap();
            assert!(matches!(answer, Answer::Refused { .. }), "{answer:?}");
        }
        reader
            .get_mut()
            .write_all(b"{\"order\":\"report\"}\n")
            .unwrap();
        let answer: Answer = read_line(&mut reader).unwrap().unwrap();
        assert!(matches!(answer, Answer::Report(_)));
    }

    #[test]
    fn any_path_survives_the_wire() {
        for bytes in [
            &b"/plain"[..],
            b"",
            b"\xff\xfe\n\"",
            "/\u{1f30a}".as_bytes(),
        ] {
            let path = RawPath(OsString::from_vec(bytes.to_vec()).into());
            let line = serde_json::to_string(&path).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<RawPath>(&line).unwrap(), path);
        }
    }
}
