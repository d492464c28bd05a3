//! What a daemon hands over to its successor, as one file and a list of descriptors.
//!
//! ```text
//! offset  size  field
//!      0     8  magic     "vhuvsock"
//!      8     8  offset    where the document is
//!     16     8  length    how long it is, in bytes
//!     24     …  bytes     of which the document names parts, then the document, in JSON
//! ```
//!
//! Numbers are little-endian. Descriptors can't be in a file: they travel beside it, and the document names them by their place in
//! the list. What the document says belongs to those who write it; here is only how it, and what it names, gets from one process
//! to the other.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::syscalls::Syscall;

/// To write a file, and to read one.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_ftruncate),
    Syscall::any(libc::SYS_pwrite64),
    Syscall::any(libc::SYS_pread64),
];

const MAGIC: [u8; 8] = *b"vhuvsock";

const HEADER_LEN: u64 = 24;

/// The longest document that is read, in bytes. A connection takes some 600 of them.
const MAX_DOCUMENT: u64 = 256 << 20;

/// Why something can't be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// It is not such a file.
    #[error("it is no state of vhost-user-vsock")]
    Magic,
    /// The document is not what was expected.
    #[error("it can't be understood: {0}")]
    Document(#[from] serde_json::Error),
    /// It names bytes or a descriptor that are not there.
    #[error("it is not complete")]
    Missing,
    /// It names a descriptor that got lost on the way. Whoever can do without it goes on.
    #[error("a descriptor of it got lost")]
    Lost,
    /// It says what can't be.
    #[error("it is wrong: {0}")]
    Invalid(&'static str),
    /// The system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A descriptor in a document: its place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SavedFd(u32);

/// A part of the file, in a document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBytes {
    offset: u64,
    len: u64,
}

impl SavedBytes {
    /// How many bytes there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Takes what is to be handed over. The descriptors stay their owners'.
#[derive(Debug)]
pub struct Saver<'fd> {
    file: &'fd File,
    end: u64,
    fds: Vec<BorrowedFd<'fd>>,
}

impl<'fd> Saver<'fd> {
    /// Begins to write `file`, whose content is lost.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(file: &'fd File) -> io::Result<Self> {
        file.set_len(0)?;
        Ok(Self {
            file,
            end: HEADER_LEN,
            fds: Vec::new(),
        })
    }

    /// Adds a descriptor.
    pub fn fd(&mut self, fd: BorrowedFd<'fd>) -> SavedFd {
        self.fds.push(fd);
        SavedFd(self.fds.len() as u32 - 1)
    }

    /// Adds bytes, which are the `parts` one after the other.
    ///
    /// # Errors
    /// The system refuses: there is no memory for them.
    pub fn bytes(&mut self, parts: &[&[u8]]) -> io::Result<SavedBytes> {
        let offset = self.end;
        for part in parts {
            self.file.write_all_at(part, self.end)?;
            self.end += part.len() as u64;
        }
        let len = self.end - offset;
        Ok(SavedBytes { offset, len })
    }

    /// Completes the file with the document, and returns the list of descriptors.
    ///
    /// # Errors
    /// The system refuses.
    pub fn finish(self, document: &impl Serialize) -> io::Result<Vec<BorrowedFd<'fd>>> {
        let document = serde_json::to_vec(document)?;
        self.file.write_all_at(&document, self.end)?;
        let numbers = [self.end, document.len() as u64].map(u64::to_le_bytes);
        let header = [&MAGIC, numbers.as_flattened()].concat();
        self.file.write_all_at(&header, 0)?;
        Ok(self.fds)
    }
}

/// Gives back what was handed over.
#[derive(Debug)]
pub struct Loader {
    file: File,
    len: u64,
    document: Vec<u8>,
    fds: Vec<SentFd>,
}

/// A place in the list of descriptors.
#[derive(Debug)]
enum SentFd {
    Here(OwnedFd),
    Lost,
    Taken,
}

impl Loader {
    /// Reads the document of a file. `fds` is the list of descriptors; those that got lost are none.
    ///
    /// # Errors
    /// It is no such file, or the system refuses.
    pub fn open(file: File, fds: Vec<Option<OwnedFd>>) -> Result<Self, LoadError> {
        let len = file.metadata()?.len();
        let mut header = [0; HEADER_LEN as usize];
        file.read_exact_at(&mut header, 0)
            .map_err(|_| LoadError::Magic)?;
        let (magic, numbers) = header.split_at(MAGIC.len());
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| numbers[at + i]));
        if magic != MAGIC {
            return Err(LoadError::Magic);
        }
        let sent = |fd: Option<OwnedFd>| fd.map_or(SentFd::Lost, SentFd::Here);
        let fds = fds.into_iter().map(sent).collect();
        let mut loader = Self {
            file,
            len,
            document: Vec::new(),
            fds,
        };
        let (offset, len) = (number(0), number(8));
        if len > MAX_DOCUMENT {
            return Err(LoadError::Invalid("a document of that length"));
        }
        loader.document = loader.read(SavedBytes { offset, len })?;
        Ok(loader)
    }

    /// The document. It may be read as several types: a part of it first, for example.
    ///
    /// # Errors
    /// It is no such document.
    pub fn document<T: DeserializeOwned>(&self) -> Result<T, LoadError> {
        Ok(serde_json::from_slice(&self.document)?)
    }

    /// Takes a descriptor out of the list.
    ///
    /// # Errors
    /// It is not there, got lost, or was taken before.
    pub fn take_fd(&mut self, fd: SavedFd) -> Result<OwnedFd, LoadError> {
        let place = self.fds.get_mut(fd.0 as usize);
        match place.map(|place| mem::replace(place, SentFd::Taken)) {
            Some(SentFd::Here(fd)) => Ok(fd),
            Some(SentFd::Lost) => Err(LoadError::Lost),
            Some(SentFd::Taken) | None => Err(LoadError::Missing),
        }
    }

    /// The descriptors that nobody has taken.
    pub fn into_fds(self) -> Vec<OwnedFd> {
        let fds = self.fds.into_iter();
        fds.filter_map(|fd| match fd {
            SentFd::Here(fd) => Some(fd),
            SentFd::Lost | SentFd::Taken => None,
        })
        .collect()
    }

    /// Copies bytes to `place`, which has their length.
    ///
    /// # Errors
    /// They are not there, or the system refuses.
    pub fn read_to(&self, bytes: SavedBytes, place: &mut [u8]) -> Result<(), LoadError> {
        let end = bytes.offset.checked_add(bytes.len);
        if place.len() as u64 != bytes.len || end.is_none_or(|end| end > self.len) {
            return Err(LoadError::Missing);
        }
        Ok(self.file.read_exact_at(place, bytes.offset)?)
    }

    /// Bytes.
    ///
    /// # Errors
    /// They are not there, or there is no memory for them.
    pub fn read(&self, bytes: SavedBytes) -> Result<Vec<u8>, LoadError> {
        if bytes.len > self.len {
            return Err(LoadError::Missing);
        }
        let mut read = Vec::new();
        let reserved = read.try_reserve_exact(bytes.len as usize);
        reserved.map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        read.resize(bytes.len as usize, 0);
        self.read_to(bytes, &mut read)?;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Document {
        bytes: SavedBytes,
        fd: SavedFd,
    }

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    fn saved() -> (File, Document) {
        let (file, other) = (file(), file());
        let mut saver = Saver::new(&file).unwrap();
        saver.bytes(&[b"before"]).unwrap();
        let document = Document {
            bytes: saver.bytes(&[b"two ", b"parts"]).unwrap(),
            fd: saver.fd(other.as_fd()),
        };
        assert_eq!(saver.finish(&document).unwrap().len(), 1);
        (file, document)
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let (file, document) = saved();
        let mut loader = Loader::open(file, vec![Some(self::file().into())]).unwrap();
        let loaded: Document = loader.document().unwrap();
        assert_eq!(loaded, document);
        assert_eq!(loader.read(loaded.bytes).unwrap(), b"two parts");
        loader.take_fd(loaded.fd).unwrap();
        assert!(matches!(loader.take_fd(loaded.fd), Err(LoadError::Missing)));
    }

    #[test]
    fn a_descriptor_that_got_lost_is_told_from_one_that_never_was() {
        let (file, document) = saved();
        let mut loader = Loader::open(file, vec![None]).unwrap();
        assert!(matches!(loader.take_fd(document.fd), Err(LoadError::Lost)));
        assert!(matches!(
            loader.take_fd(SavedFd(1)),
            Err(LoadError::Missing)
        ));
    }

    #[test]
    fn a_file_is_used_again() {
        let (file, _) = saved();
        let saver = Saver::new(&file).unwrap();
        saver.finish(&7).unwrap();
        let loader = Loader::open(file, Vec::new()).unwrap();
        assert_eq!(loader.document::<u32>().unwrap(), 7);
    }

    #[test]
    fn what_is_broken_is_refused() {
        for bytes in [
            &b""[..],
            b"vhuvsock",
            b"something that is longer than a header",
        ] {
            let mut file = file();
            file.write_all(bytes).unwrap();
            assert!(matches!(
                Loader::open(file, Vec::new()),
                Err(LoadError::Magic)
            ));
        }
        for numbers in [[24, 1 << 40], [24, 1 << 20], [1 << 40, 1], [u64::MAX, 2]] {
            let (file, _) = saved();
            let numbers = numbers.map(u64::to_le_bytes);
            file.write_all_at(numbers.as_flattened(), 8).unwrap();
            assert!(Loader::open(file, Vec::new()).is_err());
        }
        let (file, document) = saved();
        let loader = Loader::open(file, Vec::new()).unwrap();
        assert!(loader.document::<Vec<u8>>().is_err());
        for bytes in [
            SavedBytes {
                len: 1 << 40,
                ..document.bytes
            },
            SavedBytes {
                offset: u64::MAX,
                ..document.bytes
            },
        ] {
            assert!(matches!(loader.read(bytes), Err(LoadError::Missing)));
        }
    }
}
