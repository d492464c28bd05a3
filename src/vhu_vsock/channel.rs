//! The socket of a VMM.
//!
//! Nothing here blocks: a message may come in pieces, and a VMM may leave a reply unread. What has come of a message, and what
//! was not taken of a reply, stays here until there is more, so that the session can be saved at any time.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, sendmsg};
use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::{Deserialize, Serialize};

use super::message::{
    self, HEADER_LEN, Header, MAX_FDS, MAX_PAYLOAD, Message, MessageError, Request,
};
use crate::saved::{LoadError, Loader, SavedBytes, SavedFd, Saver};
use crate::syscalls::Syscall;

/// To receive messages with their descriptors, and to answer.
pub(super) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_recvmsg),
    Syscall::any(libc::SYS_sendmsg),
    Syscall::any(libc::SYS_close),
];

/// The longest message, and the longest reply, in bytes.
const MAX_MESSAGE: usize = HEADER_LEN + MAX_PAYLOAD;

/// The most descriptors of a message that is not complete: each byte of the header may bring some.
const MAX_BEGUN_FDS: usize = HEADER_LEN * MAX_FDS;

/// The socket of a VMM, and what is under way in it.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Arc<UnixStream>,
    /// What has come of the next message, and the descriptors that have come with its header.
    begun: Vec<u8>,
    files: Vec<OwnedFd>,
    /// A reply that is to be sent at once. It counts as sent in what is saved: a successor that sends it a second time breaks the
    /// session.
    reply: Vec<u8>,
    /// What the VMM has not taken yet of the last reply.
    unsent: Vec<u8>,
}

/// A channel in a document.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ChannelState {
    socket: SavedFd,
    #[serde(default)]
    begun: SavedBytes,
    #[serde(default)]
    files: Vec<SavedFd>,
    #[serde(default)]
    unsent: SavedBytes,
}

impl Channel {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket: Arc::new(socket),
            begun: Vec::new(),
            files: Vec::new(),
            reply: Vec::new(),
            unsent: Vec::new(),
        }
    }

    /// The socket, to wait for what comes.
    pub(super) fn socket(&self) -> Arc<UnixStream> {
        self.socket.clone()
    }

    /// Whether a reply waits for the VMM to read. No message is taken before.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether a message is under way.
    pub(super) fn has_begun(&self) -> bool {
        !self.begun.is_empty()
    }

    /// Whether neither a message nor a reply is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.begun.is_empty() && self.unsent.is_empty()
    }

    /// The next message, once it is complete and the last reply was taken.
    ///
    /// # Errors
    /// The VMM is gone, or sends what is no message.
    pub(super) fn receive(&mut self) -> Result<Option<Message>, MessageError> {
        if !self.flush()? {
            return Ok(None);
        }
        loop {
            let header = Header::read(&self.begun)?;
            let len = header.map_or(HEADER_LEN, Header::message_len);
            let missing = len.saturating_sub(self.begun.len());
            if missing > 0 {
                if !self.receive_part(missing)? {
                    return Ok(None);
                }
            } else if let Some(header) = header {
                let mut payload = std::mem::take(&mut self.begun);
                payload.drain(..HEADER_LEN);
                let files = std::mem::take(&mut self.files);
                return Ok(Some(Message::new(header, payload, files)));
            }
        }
    }

    /// Takes up to `missing` bytes of a message: never those of the next, whose descriptors would come along. False when
    /// there are none now.
    fn receive_part(&mut self, missing: usize) -> Result<bool, MessageError> {
        let mut bytes = [0; MAX_PAYLOAD];
        let bytes = &mut bytes[..missing.min(MAX_PAYLOAD)];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = loop {
            let parts = &mut [IoSliceMut::new(bytes)];
            match recvmsg(&*self.socket, parts, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::CONNRESET) => return Err(MessageError::Closed),
                received => break received.map_err(io::Error::from)?.bytes,
            }
        };
        let is_header = self.begun.len() < HEADER_LEN;
        for message in control.drain() {
            // Those that come with a payload belong to nothing.
            if let (true, RecvAncillaryMessage::ScmRights(fds)) = (is_header, message) {
                self.files.extend(fds);
            }
        }
        match (received, self.begun.is_empty()) {
            (0, true) => Err(MessageError::Closed),
            // In the midst of a message.
            (0, false) => Err(MessageError::Header),
            _ => {
                self.begun.extend_from_slice(&bytes[..received]);
                Ok(true)
            }
        }
    }

    /// Answers a request with the next [`Channel::flush`].
    pub(super) fn reply(&mut self, request: Request, payload: &[u8]) {
        self.reply.extend(message::reply(request, payload));
    }

    /// Sends what is left of the last reply. False where the VMM takes no more now: the rest follows with
    /// [`Channel::receive`].
    ///
    /// # Errors
    /// The VMM is gone.
    pub(super) fn flush(&mut self) -> Result<bool, MessageError> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        self.unsent.append(&mut self.reply);
        while !self.unsent.is_empty() {
            let bytes = [IoSlice::new(&self.unsent)];
            match sendmsg::<()>(self.socket.as_raw_fd(), &bytes, &[], flags, None) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Ok(false),
                Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => {
                    return Err(MessageError::Closed);
                }
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(true)
    }

    /// # Errors
    /// There is no memory for the bytes.
    pub(super) fn save<'a>(&'a self, saver: &mut Saver<'a>) -> io::Result<ChannelState> {
        Ok(ChannelState {
            socket: saver.fd(self.socket.as_fd()),
            begun: saver.bytes(&[&self.begun])?,
            files: self.files.iter().map(|fd| saver.fd(fd.as_fd())).collect(),
            unsent: saver.bytes(&[&self.unsent])?,
        })
    }

    /// # Errors
    /// The state is not complete, or more is under way than can be.
    pub(super) fn load(state: ChannelState, loader: &mut Loader) -> Result<Self, LoadError> {
        let max = MAX_MESSAGE as u64;
        if state.begun.len() > max || state.unsent.len() > max || state.files.len() > MAX_BEGUN_FDS
        {
            return Err(LoadError::Invalid("more of a message than there can be"));
        }
        let files = state.files.into_iter().map(|fd| loader.take_fd(fd));
        let files = files.collect::<Result<_, _>>()?;
        let begun = loader.read(state.begun)?;
        // One that is no header ends the session, as it would have before.
        let header = Header::read(&begun).ok().flatten();
        if header.is_some_and(|header| begun.len() > header.message_len()) {
            return Err(LoadError::Invalid("more of a message than it has"));
        }
        Ok(Self {
            socket: Arc::new(loader.take_fd(state.socket)?.into()),
            begun,
            files,
            reply: Vec::new(),
            unsent: loader.read(state.unsent)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::reload;
    use nix::sys::socket::ControlMessage;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::RawFd;

    const VERSION: u32 = 1;
    const REPLY: u32 = 1 << 2;
    const NEED_REPLY: u32 = 1 << 3;

    fn pair() -> (Channel, UnixStream) {
        let (ours, vmm) = UnixStream::pair().unwrap();
        (Channel::new(ours), vmm)
    }

    fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let header = [code, flags, payload.len() as u32].map(u32::to_ne_bytes);
        [header.as_flattened(), payload].concat()
    }

    /// SET_VRING_CALL of ring 0.
    fn call_message() -> Vec<u8> {
        message(13, VERSION, &0u64.to_ne_bytes())
    }

    fn send_with(vmm: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
        let control = [ControlMessage::ScmRights(fds)];
        let parts = [IoSlice::new(bytes)];
        let flags = MsgFlags::empty();
        let sent = sendmsg::<()>(vmm.as_raw_fd(), &parts, &control, flags, None).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// A file with these bytes.
    fn file(bytes: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes.as_bytes()).unwrap();
        file
    }

    fn content(fd: Option<OwnedFd>) -> String {
        let file = File::from(fd.unwrap());
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[track_caller]
    fn complete(channel: &mut Channel) -> Message {
        channel.receive().unwrap().expect("not complete")
    }

    fn saved_and_loaded(channel: &Channel) -> Channel {
        let file = tempfile::tempfile().unwrap();
        let (mut loader, state) = reload(&file, |saver| channel.save(saver).unwrap());
        Channel::load(state, &mut loader).unwrap()
    }

    #[test]
    fn a_message_may_come_in_pieces() {
        let (mut channel, mut vmm) = pair();
        let bytes = message(2, VERSION | NEED_REPLY, &7u64.to_ne_bytes());
        for byte in bytes {
            assert!(channel.receive().unwrap().is_none());
            vmm.write_all(&[byte]).unwrap();
        }
        let message = complete(&mut channel);
        assert_eq!(message.request, Request::SetFeatures);
        assert!(message.needs_reply);
        assert_eq!(message.u64().unwrap(), 7);
        drop(vmm);
        assert!(matches!(channel.receive(), Err(MessageError::Closed)));
    }

    #[test]
    fn two_messages_at_once_have_each_its_descriptors() {
        let (mut channel, vmm) = pair();
        let (first, second) = (file("first"), file("second"));
        send_with(&vmm, &call_message(), &[first.as_raw_fd()]);
        send_with(&vmm, &call_message(), &[second.as_raw_fd()]);
        for expected in ["first", "second"] {
            let (ring, file) = complete(&mut channel).ring_event().unwrap();
            assert_eq!((ring, &*content(file)), (0, expected));
        }
        assert!(channel.receive().unwrap().is_none() && channel.is_idle());
        // Without descriptors, both may come with one call of the system.
        (&vmm)
            .write_all(&[message(1, VERSION, &[]), message(15, VERSION, &[])].concat())
            .unwrap();
        assert_eq!(complete(&mut channel).request, Request::GetFeatures);
        assert!(channel.is_idle());
        assert_eq!(complete(&mut channel).request, Request::GetProtocolFeatures);
    }

    #[test]
    fn a_message_is_saved_in_its_midst_with_its_descriptor() {
        let bytes = call_message();
        for cut in 1..bytes.len() {
            let (mut channel, mut vmm) = pair();
            let file = file("in the midst");
            send_with(&vmm, &bytes[..cut], &[file.as_raw_fd()]);
            assert!(channel.receive().unwrap().is_none() && !channel.is_idle());
            let mut loaded = saved_and_loaded(&channel);
            drop(channel);
            assert!(loaded.receive().unwrap().is_none());
            vmm.write_all(&bytes[cut..]).unwrap();
            let (ring, file) = complete(&mut loaded).ring_event().unwrap();
            assert_eq!((ring, &*content(file)), (0, "in the midst"));
        }
    }

    #[test]
    fn a_reply_that_is_not_read_waits_and_is_saved() {
        let (mut channel, mut vmm) = pair();
        let number = |number: u64| number.to_ne_bytes();
        let mut replies = 0;
        while !channel.has_unsent() {
            channel.reply(Request::GetFeatures, &number(replies));
            channel.flush().unwrap();
            replies += 1;
        }
        vmm.write_all(&message(1, VERSION, &[])).unwrap();
        assert!(channel.receive().unwrap().is_none(), "it comes too early");
        let mut channel = saved_and_loaded(&channel);
        assert!(channel.has_unsent());
        for reply in 0..replies {
            let mut bytes = [0; HEADER_LEN + 8];
            vmm.read_exact(&mut bytes).unwrap();
            assert_eq!(
                bytes.to_vec(),
                message(1, VERSION | REPLY, &number(reply)),
                "{reply}"
            );
            if channel.has_unsent() && channel.receive().unwrap().is_some() {
                assert!(!channel.has_unsent());
            }
        }
        assert!(!channel.has_unsent());
        drop(vmm);
        channel.reply(Request::GetFeatures, &[]);
        let reply = channel.flush();
        assert!(matches!(reply, Err(MessageError::Closed)));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for bytes in [
            message(1, 0, &[]),
            message(1, 2, &[]),
            message(1, VERSION | REPLY, &[]),
            message(1, VERSION | 1 << 4, &[]),
            message(0, VERSION, &[]),
            message(99, VERSION, &[]),
            message(1, VERSION, &[0; MAX_PAYLOAD + 1]),
            message(1, VERSION, &[])[..7].to_vec(),
            message(2, VERSION, &[0; 8])[..15].to_vec(),
        ] {
            let (mut channel, mut vmm) = pair();
            vmm.write_all(&bytes).unwrap();
            drop(vmm);
            let error = channel.receive().unwrap_err();
            assert!(
                matches!(error, MessageError::Header | MessageError::Unknown(0 | 99)),
                "{error}"
            );
        }
    }
}
