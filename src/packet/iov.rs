//! Slices of guest memory as the kernel takes them, and the only `unsafe` code of the crate.
//!
//! Guest memory may change under us at any time: another processor runs the guest. So no Rust reference to it exists
//! anywhere. It is read and written through [`VolatileSlice`]s, or by the kernel, which gets `iovec`s made of them.

#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::header::HEADER_LEN;
use crate::syscalls::Syscall;

/// To move payload between guest memory and a socket.
pub(super) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_sendmsg),
    Syscall::any(libc::SYS_recvmsg),
];

/// How many slices the kernel takes in one call (`UIO_MAXIOV`).
pub(super) const MAX_SLICES: usize = 1024;

/// The allocation of a [`GuestSlices`] between two uses.
#[derive(Debug, Default)]
pub(super) struct SliceStorage(Vec<iovec>);

// SAFETY: `iovec` is not `Send` for its pointer. The vector is empty whenever a `SliceStorage` exists: it is only made by
// `default` and by `into_storage`, which clears it. So there is no pointer to send, only an allocation.
unsafe impl Send for SliceStorage {}

/// Slices of guest memory, one behind the other. They live no longer than the memory they point into.
#[derive(Debug)]
pub(super) struct GuestSlices<'m> {
    iovecs: Vec<iovec>,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> GuestSlices<'m> {
    pub(super) fn new(storage: SliceStorage) -> Self {
        Self {
            iovecs: storage.0,
            memory: PhantomData,
        }
    }

    pub(super) fn into_storage(mut self) -> SliceStorage {
        self.iovecs.clear();
        SliceStorage(self.iovecs)
    }

    pub(super) fn len(&self) -> usize {
        self.iovecs.len()
    }

    pub(super) fn push(&mut self, slice: &VolatileSlice<'m>) {
        self.iovecs.push(to_iovec(slice));
    }

    pub(super) fn replace(&mut self, index: usize, slice: &VolatileSlice<'m>) {
        self.iovecs[index] = to_iovec(slice);
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.iovecs.truncate(len);
    }

    pub(super) fn clear(&mut self) {
        self.iovecs.clear();
    }

    /// Shortens the slices in `range` to `bytes` bytes together, and returns the index behind the last one that is not
    /// empty. They hold at least as many.
    pub(super) fn shorten(&mut self, range: Range<usize>, bytes: usize) -> usize {
        let mut left = bytes;
        for index in range.clone() {
            if left == 0 {
                return index;
            }
            let slice = &mut self.iovecs[index];
            slice.iov_len = left.min(slice.iov_len);
            left -= slice.iov_len;
        }
        range.end
    }

    /// The slice at `index`.
    pub(super) fn volatile(&self, index: usize) -> VolatileSlice<'m> {
        let iovec = &self.iovecs[index];
        // SAFETY: every iovec was made by `to_iovec` from a slice that is valid for 'm, and was only shortened since.
        unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
    }

    /// Writes `bytes` over the slices in `range`, which hold as many.
    pub(super) fn write(&self, range: Range<usize>, mut bytes: &[u8]) {
        for index in range {
            let slice = self.volatile(index);
            let (part, rest) = bytes.split_at(slice.len().min(bytes.len()));
            slice.copy_from(part);
            bytes = rest;
        }
    }

    /// How many bytes the slices in `range` hold.
    pub(super) fn bytes(&self, range: Range<usize>) -> usize {
        length(&self.iovecs[range])
    }

    /// Sends the slices in `range` to a socket without waiting, and returns how many bytes it took. An error means that
    /// not even the first byte was sent.
    pub(super) fn send(&self, range: Range<usize>, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut sent = 0;
        for iovecs in self.iovecs[range].chunks(MAX_SLICES) {
            match sendmsg(socket, iovecs) {
                Ok(count) if count == length(iovecs) => sent += count,
                Ok(count) => return Ok(sent + count),
                Err(error) if sent == 0 => return Err(error),
                Err(_) => return Ok(sent),
            }
        }
        Ok(sent)
    }

    /// Receives from a socket into the first [`MAX_SLICES`] slices without waiting.
    pub(super) fn receive(&self, socket: BorrowedFd<'_>) -> io::Result<Received> {
        recvmsg(socket, &self.iovecs[..self.len().min(MAX_SLICES)])
    }
}

/// What one `recvmsg` has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// How many bytes; 0 at the end of a stream.
    pub bytes: usize,
    /// The socket had no more: there was room left for it.
    pub drained: bool,
}

fn to_iovec(slice: &VolatileSlice<'_>) -> iovec {
    iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

fn length(iovecs: &[iovec]) -> usize {
    iovecs.iter().map(|iovec| iovec.iov_len).sum()
}

/// Starts to load the cache lines of a header at the beginning of `slice`, which another processor has just written.
pub(super) fn prefetch(slice: &VolatileSlice<'_>) {
    #[cfg(target_arch = "x86_64")]
    for offset in [0, HEADER_LEN - 1] {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = slice.ptr_guard().as_ptr().wrapping_add(offset);
        // SAFETY: a prefetch has no effect on the program's state and never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, HEADER_LEN);
}

fn sendmsg(socket: BorrowedFd<'_>, iovecs: &[iovec]) -> io::Result<usize> {
    // SAFETY: a zeroed msghdr is valid: no name, no control data, no slices.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len() as _;
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    retry(|| {
        // SAFETY: the slices are valid guest memory, which the kernel only reads, as it does the list of them.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) }
    })
}

fn recvmsg(socket: BorrowedFd<'_>, iovecs: &[iovec]) -> io::Result<Received> {
    // SAFETY: a zeroed msghdr is valid: no name, no control data, no slices.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len() as _;
    let bytes = retry(|| {
        // SAFETY: the slices are valid guest memory to which no Rust reference exists, so the kernel may write there.
        // The message header outlives the call.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })?;
    // A receive also stops at descriptors that were sent along. There is no room for those, which MSG_CTRUNC reports.
    let drained = bytes < length(iovecs) && message.msg_flags & libc::MSG_CTRUNC == 0;
    Ok(Received { bytes, drained })
}

/// The result of a system call, made again after an interruption by a signal.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
