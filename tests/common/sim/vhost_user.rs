//! The frontend's half of the vhost-user protocol: messages over a Unix socket, descriptors beside them.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::memory::{GuestMemory, Region};

/// How long the daemon may take to answer a message.
const PATIENCE: Duration = Duration::from_secs(20);

/// Feature bit: protocol features can be negotiated.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol feature bits.
pub mod protocol {
    /// GET_QUEUE_NUM.
    pub const MQ: u64 = 1 << 0;
    /// NEED_REPLY.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// SET_BACKEND_REQ_FD.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// GET_CONFIG.
    pub const CONFIG: u64 = 1 << 9;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// GET_MAX_MEM_SLOTS, ADD_MEM_REG and REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE.
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// Message types, the ones a vsock frontend uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // The names are the specification's.
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    ResetDevice = 34,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetDeviceStateFd = 42,
    CheckDeviceState = 43,
}

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// The daemon has no descriptor of its own to transfer the state through.
const NO_FD: u64 = 1 << 8;

/// Where the three parts of a ring lie, as the frontend's addresses.
#[derive(Clone, Copy, Debug)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
}

/// A connection to the daemon's vhost-user socket.
pub struct Frontend {
    stream: UnixStream,
    reply_ack: bool,
}

impl Frontend {
    /// Connects.
    pub fn connect(socket: &Path) -> Self {
        Self::over(UnixStream::connect(socket).unwrap())
    }

    /// Uses a connected socket.
    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            reply_ack: false,
        }
    }

    /// The bare socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends raw bytes, for what no frontend should send.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd]) {
        let sent = self.try_send_raw(bytes, fds).unwrap();
        (&self.stream).write_all(&bytes[sent..]).unwrap();
    }

    /// Sends as many bytes as the socket takes at once; fails if the daemon is gone.
    pub fn try_send_raw(&self, bytes: &[u8], fds: &[BorrowedFd]) -> nix::Result<usize> {
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() {
            &[][..]
        } else {
            &control[..]
        };
        sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
    }

    /// Sends a raw message.
    pub fn send_message(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd]) {
        let head = [request, VERSION | flags, payload.len() as u32]
            .map(u32::to_le_bytes)
            .concat();
        self.send_raw(&[&head, payload].concat(), fds);
    }

    /// Reads the reply to `request`.
    pub fn reply(&self, request: Request) -> Vec<u8> {
        let mut head = [0; 12];
        (&self.stream)
            .read_exact(&mut head)
            .unwrap_or_else(|error| panic!("no reply to {request:?}: {error}"));
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), request as u32, "a reply to something else");
        assert_eq!(word(4) & (3 | REPLY), VERSION | REPLY, "flags of a reply");
        let mut payload = vec![0; word(8) as usize];
        (&self.stream).read_exact(&mut payload).unwrap();
        payload
    }

    /// Sends a message that has no reply of its own; waits for the ack where one was negotiated.
    pub fn set(&self, request: Request, payload: &[u8], fds: &[BorrowedFd]) {
        let status = self.set_status(request, payload, fds);
        assert_eq!(status, 0, "{request:?} was refused");
    }

    /// Like `set`, but returns the ack's status (0 if none was negotiated).
    pub fn set_status(&self, request: Request, payload: &[u8], fds: &[BorrowedFd]) -> u64 {
        let flags = if self.reply_ack { NEED_REPLY } else { 0 };
        self.send_message(request as u32, flags, payload, fds);
        if self.reply_ack {
            u64_of(&self.reply(request))
        } else {
            0
        }
    }

    fn get(&self, request: Request, payload: &[u8]) -> Vec<u8> {
        self.send_message(request as u32, 0, payload, &[]);
        self.reply(request)
    }

    /// SET_OWNER.
    pub fn set_owner(&self) {
        self.set(Request::SetOwner, &[], &[]);
    }

    /// GET_FEATURES.
    pub fn features(&self) -> u64 {
        u64_of(&self.get(Request::GetFeatures, &[]))
    }

    /// SET_FEATURES.
    pub fn set_features(&self, features: u64) {
        self.set(Request::SetFeatures, &features.to_le_bytes(), &[]);
    }

    /// GET_PROTOCOL_FEATURES.
    pub fn protocol_features(&self) -> u64 {
        u64_of(&self.get(Request::GetProtocolFeatures, &[]))
    }

    /// SET_PROTOCOL_FEATURES; with REPLY_ACK among them every later message asks for its ack.
    pub fn set_protocol_features(&mut self, features: u64) {
        self.set(Request::SetProtocolFeatures, &features.to_le_bytes(), &[]);
        self.reply_ack = features & protocol::REPLY_ACK != 0;
    }

    /// GET_QUEUE_NUM.
    pub fn queue_num(&self) -> u64 {
        u64_of(&self.get(Request::GetQueueNum, &[]))
    }

    /// SET_MEM_TABLE with all of the memory.
    pub fn set_mem_table(&self, memory: &GuestMemory) {
        self.share(memory.regions());
    }

    /// SET_MEM_TABLE with these regions.
    pub fn share<'a>(&self, regions: impl IntoIterator<Item = &'a Region>) {
        let regions: Vec<_> = regions.into_iter().collect();
        let mut payload = [regions.len() as u32, 0].map(u32::to_le_bytes).concat();
        regions
            .iter()
            .for_each(|region| payload.extend(region.describe()));
        let fds: Vec<_> = regions.iter().map(|region| region.fd.as_fd()).collect();
        self.set(Request::SetMemTable, &payload, &fds);
    }

    /// SET_DEVICE_STATE_FD: saves the state to a pipe, and returns what was written.
    pub fn save_state(&self) -> Vec<u8> {
        let (mut reader, writer) = std::io::pipe().unwrap();
        assert_eq!(self.transfer_state(0, writer.as_fd()), NO_FD);
        drop(writer);
        let mut state = Vec::new();
        reader.read_to_end(&mut state).unwrap();
        assert_eq!(self.check_state(), 0);
        state
    }

    /// SET_DEVICE_STATE_FD: loads the state from a pipe, and returns what the daemon says of it.
    pub fn load_state(&self, state: &[u8]) -> u64 {
        let (reader, mut writer) = std::io::pipe().unwrap();
        assert_eq!(self.transfer_state(1, reader.as_fd()), NO_FD);
        drop(reader);
        writer.write_all(state).unwrap();
        drop(writer);
        self.check_state()
    }

    /// SET_DEVICE_STATE_FD, with the rings stopped.
    pub fn transfer_state(&self, direction: u32, fd: BorrowedFd) -> u64 {
        let request = Request::SetDeviceStateFd;
        let payload = [direction, 0].map(u32::to_le_bytes).concat();
        self.send_message(request as u32, 0, &payload, &[fd]);
        u64_of(&self.reply(request))
    }

    /// CHECK_DEVICE_STATE: 0 for a transfer that has succeeded.
    pub fn check_state(&self) -> u64 {
        u64_of(&self.get(Request::CheckDeviceState, &[]))
    }

    /// GET_MAX_MEM_SLOTS.
    pub fn max_mem_slots(&self) -> u64 {
        u64_of(&self.get(Request::GetMaxMemSlots, &[]))
    }

    /// ADD_MEM_REG.
    pub fn add_mem_reg(&self, region: &Region) {
        assert_eq!(self.try_add_mem_reg(region), 0, "a region was refused");
    }

    /// ADD_MEM_REG of a region that may be refused: the ack's status.
    pub fn try_add_mem_reg(&self, region: &Region) -> u64 {
        let fds = [region.fd.as_fd()];
        self.set_status(Request::AddMemReg, &slot(region), &fds)
    }

    /// REM_MEM_REG.
    pub fn rem_mem_reg(&self, region: &Region) {
        assert_eq!(self.try_rem_mem_reg(region), 0, "a region is kept");
    }

    /// REM_MEM_REG of a region that may not be there: the ack's status.
    pub fn try_rem_mem_reg(&self, region: &Region) -> u64 {
        self.set_status(Request::RemMemReg, &slot(region), &[])
    }

    /// SET_VRING_NUM.
    pub fn set_vring_num(&self, index: u32, size: u32) {
        self.set(Request::SetVringNum, &state(index, size), &[]);
    }

    /// SET_VRING_ADDR.
    pub fn set_vring_addr(&self, index: u32, ring: RingAddresses) {
        let mut payload = state(index, 0);
        payload.extend(
            [ring.desc, ring.used, ring.avail, 0]
                .map(u64::to_le_bytes)
                .concat(),
        );
        self.set(Request::SetVringAddr, &payload, &[]);
    }

    /// SET_VRING_BASE.
    pub fn set_vring_base(&self, index: u32, base: u16) {
        self.set(Request::SetVringBase, &state(index, base.into()), &[]);
    }

    /// GET_VRING_BASE: stops the ring.
    pub fn vring_base(&self, index: u32) -> u16 {
        let reply = self.get(Request::GetVringBase, &state(index, 0));
        assert_eq!(reply[0..4], index.to_le_bytes(), "the base of another ring");
        u32::from_le_bytes(reply[4..8].try_into().unwrap())
            .try_into()
            .unwrap()
    }

    /// SET_VRING_KICK, SET_VRING_CALL or SET_VRING_ERR, with its eventfd.
    pub fn set_vring_fd(&self, request: Request, index: u32, fd: BorrowedFd) {
        self.set(request, &u64::from(index).to_le_bytes(), &[fd]);
    }

    /// SET_VRING_ENABLE.
    pub fn set_vring_enable(&self, index: u32, enable: bool) {
        self.set(Request::SetVringEnable, &state(index, enable.into()), &[]);
    }

    /// GET_CONFIG; `None` if the daemon rejects the range (an empty reply).
    pub fn config(&self, offset: u32, len: u32) -> Option<Vec<u8>> {
        let mut payload = [offset, len, 0].map(u32::to_le_bytes).concat();
        payload.resize(12 + len as usize, 0);
        let reply = self.get(Request::GetConfig, &payload);
        (reply.len() == payload.len()).then(|| reply[12..].to_vec())
    }

    /// RESET_DEVICE.
    pub fn reset_device(&self) {
        self.set(Request::ResetDevice, &[], &[]);
    }

    /// SET_BACKEND_REQ_FD.
    pub fn set_backend_req_fd(&self, fd: BorrowedFd) {
        self.set(Request::SetBackendReqFd, &[], &[fd]);
    }
}

fn state(index: u32, num: u32) -> Vec<u8> {
    [index, num].map(u32::to_le_bytes).concat()
}

/// The payload of ADD_MEM_REG and REM_MEM_REG: padding, and the region.
fn slot(region: &Region) -> Vec<u8> {
    [&[0; 8], &region.describe()[..]].concat()
}

fn u64_of(payload: &[u8]) -> u64 {
    u64::from_le_bytes(payload.try_into().expect("a reply that is no u64"))
}
