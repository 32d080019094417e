//! Contents of files: creating and replacing them from a stream, writing into them, reading them.

use std::collections::VecDeque;
use std::io::{self, Read};

use lowtide_engine_core::ids::NodeId;
use lowtide_engine_core::op::Mode;
use lowtide_engine_core::session::{Scan, Session};

use super::upload::Upload;
use super::{Tree, corrupt, demand_name};
use crate::error::TreeError;
use crate::layout::{
    self, Attributes, CHUNK_LOG2_MAX, Chunk, Entry, Ino, Inode, Kind, Malformed, Rooms,
};
use crate::plan::Plan;

/// Bytes asked for ahead of a reader, per object server.
const READ_AHEAD_BYTES: usize = 1 << 20;

impl<'s, S: Session + ?Sized> Tree<'s, S> {
    /// Creates a file with everything that `content` yields. Memory needed is some chunks,
    /// whatever the size. The file appears whole.
    ///
    /// # Errors
    /// As [`Tree::mkdir`]; [`TreeError::Input`] when `content` fails, [`TreeError::Contended`]
    /// also when somebody else creates the same name at the same time. Nothing remains then.
    pub fn create(
        &self,
        directory: Ino,
        name: &[u8],
        attributes: &Attributes,
        content: &mut dyn Read,
    ) -> Result<Ino, TreeError> {
        self.place(directory, name, attributes, content, false)
    }

    /// As [`Tree::create`], but a file or symbolic link of that name is replaced, in the moment
    /// in which the new file appears.
    ///
    /// # Errors
    /// As [`Tree::create`]; [`TreeError::IsADirectory`] when the name is a directory's.
    pub fn replace(
        &self,
        directory: Ino,
        name: &[u8],
        attributes: &Attributes,
        content: &mut dyn Read,
    ) -> Result<Ino, TreeError> {
        self.place(directory, name, attributes, content, true)
    }

    /// Overwrites a file from `offset` on with everything that `content` yields; the file grows
    /// as needed. Returns the number of bytes written. Each chunk changes atomically, the whole
    /// does not. The modification time stays.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::NotAFile`], [`TreeError::BeyondEnd`] when `offset`
    /// is larger than the file, [`TreeError::Input`].
    pub fn write(&self, ino: Ino, offset: u64, content: &mut dyn Read) -> Result<u64, TreeError> {
        let mut at = offset;
        loop {
            let chunk_size = self.demand_file(ino)?.chunk_size();
            let room = chunk_size - at % chunk_size;
            let bytes = read_up_to(content, room as usize)?;
            if bytes.is_empty() {
                return Ok(at - offset);
            }
            self.write_within_chunk(ino, at, &bytes)?;
            at += bytes.len() as u64;
        }
    }

    /// Reads a file from its begin. Its size is that of this moment.
    ///
    /// # Errors
    /// [`TreeError::NotFound`], [`TreeError::NotAFile`], [`TreeError::Corrupt`].
    pub fn read<'t>(&'t self, ino: Ino) -> Result<Reader<'t, 's, S>, TreeError> {
        let inode = self.demand_file(ino)?;
        Ok(self.reader(ino, inode))
    }

    /// Reads a file whose inode is known.
    pub(crate) fn reader<'t>(&'t self, ino: Ino, inode: Inode) -> Reader<'t, 's, S> {
        let servers = self.layout.object().len();
        Reader {
            tree: self,
            ino,
            inode,
            next: 0,
            ahead: (0..servers).map(|_| Ahead::default()).collect(),
            current: None,
        }
    }

    /// Creates an inode of at most one chunk, or replaces what stands at its name if that is no
    /// directory.
    pub(crate) fn replace_whole(
        &self,
        directory: Ino,
        name: &[u8],
        inode: &Inode,
        chunk: Option<&Chunk>,
    ) -> Result<Ino, TreeError> {
        let ino = self.allocate()?;
        let freed = self.attempt(|| {
            let mut plan = Plan::default();
            let freed = self.plan_replace(&mut plan, directory, name, ino, inode)?;
            if let Some(chunk) = chunk {
                self.plan_chunk(&mut plan, ino, 0, chunk);
            }
            Ok((plan, freed))
        })?;
        self.free_replaced(freed)?;
        Ok(ino)
    }

    /// Lets `name` be one more name of `target`, whatever it named before unless a directory.
    pub(crate) fn replace_link(
        &self,
        directory: Ino,
        name: &[u8],
        target: Entry,
    ) -> Result<(), TreeError> {
        let freed = self.attempt(|| {
            let mut plan = Plan::default();
            let before = self.read_entry(directory, name)?;
            if before.as_ref().is_some_and(|(entry, _)| *entry == target) {
                return Ok((plan, None));
            }
            let old = demand_no_directory(before.as_ref().map(|(entry, _)| *entry))?;
            self.demand_directory(directory)?;
            let home = self.layout.home(target.ino);
            self.read_stat(target.ino)?;
            self.plan_entry(&mut plan, directory, name, target, before.map(|b| b.1));
            plan.present(home, layout::inode_key(target.ino));
            plan.lock(home, layout::inode_range(target.ino), Mode::Exclusive);
            plan.add(home, layout::count_key(target.ino), 1);
            let freed = match old {
                Some(old) if self.plan_release(&mut plan, old)? => Some(old.ino),
                _ => None,
            };
            Ok((plan, freed))
        })?;
        self.free_replaced(freed)
    }

    fn place(
        &self,
        directory: Ino,
        name: &[u8],
        attributes: &Attributes,
        content: &mut dyn Read,
        may_replace: bool,
    ) -> Result<Ino, TreeError> {
        demand_name(name)?;
        self.file_inode(0, attributes)?;
        let chunk_size = 1 << self.chunk_log2;
        let first = read_up_to(content, chunk_size)?;
        let second = if first.len() == chunk_size {
            read_up_to(content, chunk_size)?
        } else {
            Vec::new()
        };
        if !second.is_empty() {
            return self.place_large(
                directory,
                name,
                attributes,
                (&first, &second),
                content,
                may_replace,
            );
        }
        let inode = self.file_inode(first.len() as u64, attributes)?;
        let chunk = (!first.is_empty()).then(|| Chunk::new(&first));
        if may_replace {
            return self.replace_whole(directory, name, &inode, chunk.as_ref());
        }
        self.create_whole(directory, name, &inode, chunk.as_ref())
    }

    fn place_large(
        &self,
        directory: Ino,
        name: &[u8],
        attributes: &Attributes,
        begin: (&[u8], &[u8]),
        content: &mut dyn Read,
        may_replace: bool,
    ) -> Result<Ino, TreeError> {
        if may_replace {
            self.demand_directory(directory)?;
            demand_no_directory(self.read_entry(directory, name)?.map(|(entry, _)| entry))?;
        } else {
            self.demand_free(directory, name)?;
        }
        let ino = self.allocate()?;
        let mut upload = Upload::begin(self, directory, name, ino)?;
        let finished = self
            .upload_all(&mut upload, begin, content)
            .and_then(|size| {
                let inode = self.file_inode(size, attributes)?;
                self.attempt(|| {
                    if !upload.is_ours()? {
                        return Err(TreeError::Contended);
                    }
                    let mut plan = Plan::default();
                    let freed = if may_replace {
                        self.plan_replace(&mut plan, directory, name, ino, &inode)?
                    } else {
                        self.demand_free(directory, name)?;
                        let kind = Kind::File;
                        self.plan_entry(&mut plan, directory, name, Entry { ino, kind }, None);
                        self.plan_inode(&mut plan, directory, ino, &inode);
                        None
                    };
                    upload.plan_finish(&mut plan);
                    Ok((plan, freed))
                })
            });
        match finished {
            Ok(freed) => {
                self.free_replaced(freed)?;
                Ok(ino)
            }
            Err(e) => {
                upload.cancel()?;
                Err(e)
            }
        }
    }

    fn upload_all(
        &self,
        upload: &mut Upload<'_, 's, S>,
        begin: (&[u8], &[u8]),
        content: &mut dyn Read,
    ) -> Result<u64, TreeError> {
        upload.push(Chunk::new(begin.0))?;
        upload.push(Chunk::new(begin.1))?;
        let chunk_size = begin.0.len();
        let mut size = (begin.0.len() + begin.1.len()) as u64;
        let mut is_last = begin.1.len() < chunk_size;
        let mut rooms = Rooms::default();
        while !is_last {
            let chunk = Chunk::fill(&mut rooms, chunk_size, |room| fill_from(content, room))?;
            let len = chunk.as_ref().map_or(0, Chunk::len);
            is_last = len < chunk_size;
            size += len as u64;
            if let Some(chunk) = chunk {
                upload.push(chunk)?;
            }
        }
        upload.flush()?;
        Ok(size)
    }

    /// Adds a new inode under a name that may stand for something else than a directory. Returns
    /// the file whose chunks are to be freed afterwards, if any.
    fn plan_replace(
        &self,
        plan: &mut Plan,
        directory: Ino,
        name: &[u8],
        ino: Ino,
        inode: &Inode,
    ) -> Result<Option<Ino>, TreeError> {
        self.demand_directory(directory)?;
        let before = self.read_entry(directory, name)?;
        let old = demand_no_directory(before.as_ref().map(|(entry, _)| *entry))?;
        let kind = inode.kind;
        let entry = Entry { ino, kind };
        self.plan_entry(plan, directory, name, entry, before.map(|b| b.1));
        self.plan_inode(plan, directory, ino, inode);
        match old {
            Some(old) if self.plan_release(plan, old)? => Ok(Some(old.ino)),
            _ => Ok(None),
        }
    }

    fn free_replaced(&self, freed: Option<Ino>) -> Result<(), TreeError> {
        freed.map_or(Ok(()), |ino| self.free(ino))
    }

    fn demand_file(&self, ino: Ino) -> Result<Inode, TreeError> {
        let inode = self.read_stat(ino)?.stat.inode;
        if inode.kind == Kind::File {
            Ok(inode)
        } else {
            Err(TreeError::NotAFile)
        }
    }

    /// Writes bytes that lie within one chunk.
    fn write_within_chunk(&self, ino: Ino, at: u64, bytes: &[u8]) -> Result<(), TreeError> {
        self.attempt(|| {
            let read = self.read_stat(ino)?;
            let mut inode = read.stat.inode;
            if at > inode.size {
                return Err(TreeError::BeyondEnd);
            }
            let number = at >> inode.chunk_log2;
            let begin = (at - (number << inode.chunk_log2)) as usize;
            let mut contents = vec![0; inode.chunk_len(number) as usize];
            if !contents.is_empty() {
                self.read_chunk(ino, &inode, number)?
                    .copy_to(0, &mut contents);
            }
            let end = begin + bytes.len();
            contents.resize(contents.len().max(end), 0);
            contents[begin..end].copy_from_slice(bytes);

            // So that a write planned on the same old contents is planned anew.
            inode.writes = inode.writes.wrapping_add(1);
            inode.size = inode.size.max(at + bytes.len() as u64);
            let home = self.layout.home(ino);
            let data_home = self.layout.chunk_home(ino, number);
            let mut plan = Plan::default();
            plan.equal(home, layout::inode_key(ino), read.inode_bytes);
            plan.put(home, layout::inode_key(ino), inode.encode());
            plan.put(
                data_home,
                layout::chunk_key(ino, number),
                Chunk::new(&contents).encode(),
            );
            Ok((plan, ()))
        })
    }

    /// One chunk of a file with this inode.
    pub(crate) fn read_chunk(
        &self,
        ino: Ino,
        inode: &Inode,
        number: u64,
    ) -> Result<Chunk, TreeError> {
        let home = self.layout.chunk_home(ino, number);
        let key = layout::chunk_key(ino, number);
        match self.session.read(home, &key)? {
            Some(value) => self.decode_chunk(ino, inode, number, &value),
            None => Err(self.missing_chunk(ino, number)),
        }
    }

    fn decode_chunk(
        &self,
        ino: Ino,
        inode: &Inode,
        number: u64,
        value: &lowtide_engine_core::op::Bytes,
    ) -> Result<Chunk, TreeError> {
        let chunk = Chunk::decode(value).and_then(|chunk| {
            if chunk.len() as u64 == inode.chunk_len(number) {
                Ok(chunk)
            } else {
                Err(Malformed::Contradiction)
            }
        });
        chunk.map_err(|why| {
            let home = self.layout.chunk_home(ino, number);
            corrupt(home, &layout::chunk_key(ino, number), why)
        })
    }

    /// Why a chunk is not there: the file may have been deleted meanwhile.
    fn missing_chunk(&self, ino: Ino, number: u64) -> TreeError {
        match self.read_stat(ino) {
            Ok(_) => {
                let home = self.layout.chunk_home(ino, number);
                corrupt(home, &layout::chunk_key(ino, number), Malformed::Missing)
            }
            Err(e) => e,
        }
    }
}

/// What a reader has of one object server.
#[derive(Debug, Default)]
struct Ahead {
    /// Chunks fetched but not yet handed out.
    fetched: VecDeque<(u64, Chunk)>,
    /// The page behind them, asked for while they are read.
    asked: Option<Scan>,
}

/// A file being read, chunk by chunk and somewhat ahead.
pub struct Reader<'t, 's, S: Session + ?Sized> {
    tree: &'t Tree<'s, S>,
    ino: Ino,
    inode: Inode,
    /// Number of the next chunk.
    next: u64,
    /// What came and is still to come, per object server.
    ahead: Vec<Ahead>,
    /// Chunk that [`Read`] is in, and how much of it has been read.
    current: Option<(Chunk, usize)>,
}

impl<S: Session + ?Sized> Reader<'_, '_, S> {
    /// Size of the file when it was opened, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.inode.size
    }

    /// The next chunk, `None` after the last.
    ///
    /// # Errors
    /// [`TreeError::NotFound`] when the file was deleted meanwhile, [`TreeError::Corrupt`].
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>, TreeError> {
        if self.next >= self.inode.chunks() {
            return Ok(None);
        }
        let number = self.next;
        let tree = self.tree;
        let chunk = if self.inode.chunks() == 1 {
            tree.read_chunk(self.ino, &self.inode, 0)?
        } else {
            let server = (number % self.ahead.len() as u64) as usize;
            if self.ahead[server].fetched.is_empty() {
                self.fetch_from(server)?;
            }
            match self.ahead[server].fetched.pop_front() {
                Some((n, chunk)) if n == number => chunk,
                _ => return Err(tree.missing_chunk(self.ino, number)),
            }
        };
        self.next += 1;
        Ok(Some(chunk))
    }

    /// Fetches chunks from `next` on from the server that has it, and asks for those behind them.
    fn fetch_from(&mut self, server: usize) -> Result<(), TreeError> {
        let home = self.tree.layout.chunk_home(self.ino, self.next);
        let asked = match self.ahead[server].asked.take() {
            Some(asked) => asked,
            None => self.ask(home, self.next.checked_sub(1)),
        };
        let page = self.tree.session.scanned(asked)?;
        let mut last = None;
        for (key, value) in page.entries {
            let number =
                layout::chunk_number(&key).ok_or_else(|| corrupt(home, &key, Malformed::Key))?;
            if number >= self.inode.chunks() {
                break; // written after this reader was opened
            }
            let chunk = self
                .tree
                .decode_chunk(self.ino, &self.inode, number, &value)?;
            self.ahead[server].fetched.push_back((number, chunk));
            last = Some(number);
        }
        if let Some(last) = last
            && last + (self.ahead.len() as u64) < self.inode.chunks()
        {
            self.ahead[server].asked = Some(self.ask(home, Some(last)));
        }
        Ok(())
    }

    /// Asks for chunks behind number `after`.
    fn ask(&self, home: NodeId, after: Option<u64>) -> Scan {
        let range = layout::data_range(self.ino);
        let after = after.map(|number| layout::chunk_key(self.ino, number));
        let session = self.tree.session;
        session.scan_ahead(home, range, after.as_ref(), READ_AHEAD_BYTES)
    }
}

impl<S: Session + ?Sized> Drop for Reader<'_, '_, S> {
    fn drop(&mut self) {
        for asked in self.ahead.iter_mut().filter_map(|a| a.asked.take()) {
            // Or the session would keep it; whatever it is, nobody asks any more.
            let _ = self.tree.session.scanned(asked);
        }
    }
}

impl<S: Session + ?Sized> Read for Reader<'_, '_, S> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some((chunk, at)) = &mut self.current {
                let copied = chunk.copy_to(*at, to);
                *at += copied;
                if copied > 0 || to.is_empty() {
                    return Ok(copied);
                }
            }
            match self.next_chunk().map_err(io::Error::other)? {
                Some(chunk) => self.current = Some((chunk, 0)),
                None => return Ok(0),
            }
        }
    }
}

fn demand_no_directory(entry: Option<Entry>) -> Result<Option<Entry>, TreeError> {
    match entry {
        Some(entry) if entry.kind == Kind::Directory => Err(TreeError::IsADirectory),
        other => Ok(other),
    }
}

/// Reads until `max` bytes are there or the stream ends.
fn read_up_to(content: &mut dyn Read, max: usize) -> Result<Vec<u8>, TreeError> {
    debug_assert!(max <= 1 << CHUNK_LOG2_MAX);
    let mut bytes = Vec::new();
    content
        .take(max as u64)
        .read_to_end(&mut bytes)
        .map_err(TreeError::Input)?;
    Ok(bytes)
}

/// Reads until `room` is full or the stream ends; returns how much came.
fn fill_from(content: &mut dyn Read, room: &mut [u8]) -> Result<usize, TreeError> {
    let mut filled = 0;
    while filled < room.len() {
        match content.read(&mut room[filled..]) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(TreeError::Input(e)),
        }
    }
    Ok(filled)
}
