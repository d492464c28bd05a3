//! A proxy between a UML kernel and the daemon, for control messages only. It works around two quirks of UML's
//! vhost-user frontend.
//!
//! - It pads SET_MEM_TABLE to two regions, whatever their number.
//! - It creates no device without the protocol feature BACKEND_REQ, which a vsock device has no use for.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::close;

const HEADER_SIZE: usize = 12;
const MAX_PAYLOAD: usize = 4096;

const SET_MEM_TABLE: u32 = 5;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_BACKEND_REQ_FD: u32 = 21;

const BACKEND_REQ: u64 = 1 << 5;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Listens at `path` for one UML kernel and connects it to the daemon's `backend` socket, until one of the two ends.
pub fn start(path: &Path, backend: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    let backend = backend.to_owned();
    thread::spawn(move || {
        let (uml, _) = listener.accept()?;
        let daemon = UnixStream::connect(backend)?;
        let (uml_too, daemon_too) = (uml.try_clone()?, daemon.try_clone()?);
        thread::spawn(move || {
            relay(&daemon_too, &uml_too, |message| {
                correct_reply(message);
                Ok(Route::Forward)
            })
        });
        relay(&uml, &daemon, |message| correct_request(message, &uml));
        io::Result::Ok(())
    });
}

/// A vhost-user message with the descriptors that came with it, which are closed when this is dropped.
struct Message {
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    descriptors: Vec<RawFd>,
}

impl Drop for Message {
    fn drop(&mut self) {
        for &descriptor in &self.descriptors {
            let _ = close(descriptor);
        }
    }
}

enum Route {
    Forward,
    /// Drops the message but keeps its descriptors open: UML gives up its device when the other end of one is closed.
    Keep,
}

/// Passes messages on, as `correct` changes them, until either end is closed; then closes both.
fn relay(from: &UnixStream, to: &UnixStream, correct: impl Fn(&mut Message) -> io::Result<Route>) {
    let mut kept = Vec::new();
    while let Ok(mut message) = receive(from) {
        let done = match correct(&mut message) {
            Ok(Route::Forward) => send(to, &message),
            Ok(Route::Keep) => {
                kept.push(message);
                Ok(())
            }
            Err(error) => Err(error),
        };
        if done.is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn correct_request(message: &mut Message, uml: &UnixStream) -> io::Result<Route> {
    match message.request {
        SET_MEM_TABLE => {
            let regions = u32::from_ne_bytes(message.payload[..4].try_into().unwrap());
            message.payload.truncate(8 + 32 * regions as usize);
        }
        SET_PROTOCOL_FEATURES => change_u64(message, |features| features & !BACKEND_REQ),
        SET_BACKEND_REQ_FD => {
            if message.flags & NEED_REPLY != 0 {
                send(uml, &success(message.request))?;
            }
            return Ok(Route::Keep);
        }
        _ => {}
    }
    Ok(Route::Forward)
}

fn correct_reply(message: &mut Message) {
    if message.request == GET_PROTOCOL_FEATURES {
        change_u64(message, |features| features | BACKEND_REQ);
    }
}

fn change_u64(message: &mut Message, change: impl Fn(u64) -> u64) {
    let value = u64::from_ne_bytes(message.payload[..8].try_into().unwrap());
    message.payload[..8].copy_from_slice(&change(value).to_ne_bytes());
}

fn success(request: u32) -> Message {
    Message {
        request,
        flags: VERSION | REPLY,
        payload: 0u64.to_ne_bytes().to_vec(),
        descriptors: Vec::new(),
    }
}

/// Receives one whole message; an error when the other end is closed.
fn receive(stream: &UnixStream) -> io::Result<Message> {
    let mut message = Message {
        request: 0,
        flags: 0,
        payload: Vec::new(),
        descriptors: Vec::new(),
    };
    let mut header = [0; HEADER_SIZE];
    receive_exactly(stream, &mut header, &mut message.descriptors)?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    message.request = word(0);
    message.flags = word(4);
    let size = word(8) as usize;
    if size > MAX_PAYLOAD {
        return Err(io::ErrorKind::InvalidData.into());
    }
    message.payload.resize(size, 0);
    receive_exactly(stream, &mut message.payload, &mut message.descriptors)?;
    Ok(message)
}

fn receive_exactly(
    stream: &UnixStream,
    mut buffer: &mut [u8],
    descriptors: &mut Vec<RawFd>,
) -> io::Result<()> {
    while !buffer.is_empty() {
        let mut control = cmsg_space!([RawFd; 8]);
        let mut parts = [IoSliceMut::new(buffer)];
        let received = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for part in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(rights) = part {
                descriptors.extend(rights);
            }
        }
        let bytes = received.bytes;
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[bytes..];
    }
    Ok(())
}

fn send(stream: &UnixStream, message: &Message) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER_SIZE + message.payload.len());
    for word in [message.request, message.flags, message.payload.len() as u32] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(&message.payload);
    let rights = [ControlMessage::ScmRights(&message.descriptors)];
    let control = if message.descriptors.is_empty() {
        &[][..]
    } else {
        &rights[..]
    };
    // A message is far smaller than the socket buffer: a blocking send takes it whole.
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}
