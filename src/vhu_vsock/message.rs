//! The messages of a vhost-user session (vhost-user, "Message Specification").
//!
//! ```text
//! offset  size  field
//!      0     4  request      what the message asks, or answers
//!      4     4  flags        bits 0-1 the version, 1; bit 2 a reply; bit 3 the VMM wants a reply
//!      8     4  size         bytes of payload behind the header
//! ```
//!
//! All numbers are in the byte order of the host. Descriptors come along with the first byte of a message.

use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

pub(super) const HEADER_LEN: usize = 12;

/// The most bytes of payload. No message that is understood has as many.
pub(super) const MAX_PAYLOAD: usize = 4096;

/// The most descriptors with a message: as many as SET_MEM_TABLE may have regions.
pub(super) const MAX_FDS: usize = 32;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What a VMM asks, in the words of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
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
    SetConfig = 25,
    ResetDevice = 34,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetDeviceStateFd = 42,
    CheckDeviceState = 43,
}

impl Request {
    /// All that are understood. A VMM sends no other: it asks for what was offered.
    const ALL: [Self; 25] = [
        Self::GetFeatures,
        Self::SetFeatures,
        Self::SetOwner,
        Self::ResetOwner,
        Self::SetMemTable,
        Self::SetVringNum,
        Self::SetVringAddr,
        Self::SetVringBase,
        Self::GetVringBase,
        Self::SetVringKick,
        Self::SetVringCall,
        Self::SetVringErr,
        Self::GetProtocolFeatures,
        Self::SetProtocolFeatures,
        Self::GetQueueNum,
        Self::SetVringEnable,
        Self::SetBackendReqFd,
        Self::GetConfig,
        Self::SetConfig,
        Self::ResetDevice,
        Self::GetMaxMemSlots,
        Self::AddMemReg,
        Self::RemMemReg,
        Self::SetDeviceStateFd,
        Self::CheckDeviceState,
    ];

    fn from_code(code: u32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|request| *request as u32 == code)
    }

    /// Whether the VMM only asks, and what was negotiated and set up stays as it is.
    pub(super) fn is_question(self) -> bool {
        matches!(
            self,
            Self::GetFeatures
                | Self::GetProtocolFeatures
                | Self::GetQueueNum
                | Self::GetMaxMemSlots
                | Self::GetConfig
        )
    }
}

/// What comes before the payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    request: Request,
    needs_reply: bool,
    /// How long the payload is, in bytes.
    len: usize,
}

impl Header {
    /// The header of a request that begins with `bytes`. None if they are not enough.
    pub(super) fn read(bytes: &[u8]) -> Result<Option<Self>, MessageError> {
        if bytes.len() < HEADER_LEN {
            return Ok(None);
        }
        let (flags, len) = (u32_at(bytes, 4), u32_at(bytes, 8) as usize);
        if flags & !NEED_REPLY != VERSION || len > MAX_PAYLOAD {
            return Err(MessageError::Header);
        }
        let code = u32_at(bytes, 0);
        let request = Request::from_code(code).ok_or(MessageError::Unknown(code))?;
        Ok(Some(Self {
            request,
            needs_reply: flags & NEED_REPLY != 0,
            len,
        }))
    }

    /// How long the whole message is, in bytes.
    pub(super) fn message_len(self) -> usize {
        HEADER_LEN + self.len
    }
}

/// The reply to a request, with its header.
pub(super) fn reply(request: Request, payload: &[u8]) -> Vec<u8> {
    let header = [request as u32, VERSION | REPLY, payload.len() as u32];
    [header.map(u32::to_ne_bytes).as_flattened(), payload].concat()
}

/// Why there is no message.
#[derive(Debug, Error)]
pub(crate) enum MessageError {
    /// The VMM has closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// The socket fails.
    #[error("the socket fails: {0}")]
    Socket(#[from] io::Error),
    /// The header is not that of a request.
    #[error("a header that no request has")]
    Header,
    /// The request is not one that is understood.
    #[error("unknown request {0}")]
    Unknown(u32),
    /// The payload is not as long as the request's.
    #[error("a payload of {len} bytes with {request:?}")]
    Length {
        /// The request.
        request: Request,
        /// How long its payload is.
        len: usize,
    },
    /// There are more or fewer descriptors than the request has.
    #[error("{count} descriptors with {request:?}")]
    Descriptors {
        /// The request.
        request: Request,
        /// How many descriptors there are.
        count: usize,
    },
}

/// A message from the VMM.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: Request,
    /// The VMM wants to know how it went.
    pub(super) needs_reply: bool,
    payload: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Message {
    pub(super) fn new(header: Header, payload: Vec<u8>, files: Vec<OwnedFd>) -> Self {
        Self {
            request: header.request,
            needs_reply: header.needs_reply,
            payload,
            files,
        }
    }

    /// Checks that it has neither payload nor descriptors.
    pub(super) fn empty(&self) -> Result<(), MessageError> {
        self.bytes::<0>().map(|_| ())
    }

    /// The payload of a message without descriptors, of this length.
    fn bytes<const N: usize>(&self) -> Result<[u8; N], MessageError> {
        self.check_files(0)?;
        self.sized()
    }

    fn sized<const N: usize>(&self) -> Result<[u8; N], MessageError> {
        let len = self.payload.len();
        let bytes = self.payload.as_slice().try_into();
        bytes.map_err(|_| self.wrong_length(len))
    }

    fn wrong_length(&self, len: usize) -> MessageError {
        let request = self.request;
        MessageError::Length { request, len }
    }

    fn check_files(&self, wanted: usize) -> Result<(), MessageError> {
        let (request, count) = (self.request, self.files.len());
        if count == wanted {
            Ok(())
        } else {
            Err(MessageError::Descriptors { request, count })
        }
    }

    /// A payload that is one number.
    pub(super) fn u64(&self) -> Result<u64, MessageError> {
        self.bytes().map(u64::from_ne_bytes)
    }

    /// A payload of two numbers: a ring, and something about it.
    pub(super) fn ring_state(&self) -> Result<(u32, u32), MessageError> {
        let bytes: [u8; 8] = self.bytes()?;
        Ok((u32_at(&bytes, 0), u32_at(&bytes, 4)))
    }

    /// The payload of SET_VRING_ADDR.
    pub(super) fn ring_addresses(&self) -> Result<RingAddresses, MessageError> {
        let bytes: [u8; 40] = self.bytes()?;
        Ok(RingAddresses {
            ring: u32_at(&bytes, 0),
            flags: u32_at(&bytes, 4),
            descriptors: u64_at(&bytes, 8),
            used: u64_at(&bytes, 16),
            available: u64_at(&bytes, 24),
        })
    }

    /// The ring and the eventfd of SET_VRING_KICK, _CALL and _ERR. Without one, the ring is polled.
    pub(super) fn ring_event(&mut self) -> Result<(u32, Option<OwnedFd>), MessageError> {
        const RING: u64 = 0xff;
        const NO_FD: u64 = 1 << 8;
        let number = u64::from_ne_bytes(self.sized()?);
        let has_fd = number & NO_FD == 0;
        self.check_files(has_fd.into())?;
        Ok(((number & RING) as u32, self.files.pop()))
    }

    /// The one descriptor of a message with a payload of this length.
    pub(super) fn file<const N: usize>(&mut self) -> Result<([u8; N], OwnedFd), MessageError> {
        let bytes = self.sized()?;
        match self.files.pop() {
            Some(file) if self.files.is_empty() => Ok((bytes, file)),
            popped => {
                let (request, others) = (self.request, self.files.len());
                let count = others + usize::from(popped.is_some());
                Err(MessageError::Descriptors { request, count })
            }
        }
    }

    /// The regions of SET_MEM_TABLE, each with its descriptor.
    pub(super) fn regions(&mut self) -> Result<Vec<(RegionMessage, OwnedFd)>, MessageError> {
        const COUNT_LEN: usize = 8;
        let len = self.payload.len();
        let (count, regions) = match self.payload.split_at_checked(COUNT_LEN) {
            Some((count, regions)) => (u64_at(count, 0), regions),
            None => return Err(self.wrong_length(len)),
        };
        // The upper half is padding.
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count == 0 || count > MAX_FDS || regions.len() != count * RegionMessage::LEN {
            return Err(self.wrong_length(len));
        }
        self.check_files(count)?;
        let regions = regions.chunks_exact(RegionMessage::LEN);
        Ok(regions
            .map(RegionMessage::read)
            .zip(self.files.drain(..))
            .collect())
    }

    /// The region of ADD_MEM_REG, and its descriptor.
    pub(super) fn region_to_add(&mut self) -> Result<(RegionMessage, OwnedFd), MessageError> {
        let (bytes, file) = self.file()?;
        Ok((RegionMessage::read_single(&bytes), file))
    }

    /// The region of REM_MEM_REG. Descriptors may come along ("for compatibility with existing incorrect implementations").
    pub(super) fn region_to_remove(&self) -> Result<RegionMessage, MessageError> {
        Ok(RegionMessage::read_single(&self.sized()?))
    }

    /// The direction and the phase of SET_DEVICE_STATE_FD, and the file.
    pub(super) fn transfer(&mut self) -> Result<((u32, u32), OwnedFd), MessageError> {
        let (bytes, file): ([u8; 8], _) = self.file()?;
        Ok(((u32_at(&bytes, 0), u32_at(&bytes, 4)), file))
    }

    /// The part of the configuration space that GET_CONFIG and SET_CONFIG are about, with its bytes.
    pub(super) fn config(&self) -> Result<(ConfigHeader, &[u8]), MessageError> {
        self.check_files(0)?;
        let len = self.payload.len();
        match self.payload.split_at_checked(ConfigHeader::LEN) {
            Some((header, bytes)) if u32_at(header, 4) as usize == bytes.len() => {
                let (offset, flags) = (u32_at(header, 0), u32_at(header, 8));
                Ok((ConfigHeader { offset, flags }, bytes))
            }
            _ => Err(self.wrong_length(len)),
        }
    }
}

/// Where a ring is, in the VMM's own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) ring: u32,
    pub(super) flags: u32,
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
}

/// A region of memory, as the VMM describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionMessage {
    pub(super) guest_addr: u64,
    pub(super) size: u64,
    pub(super) user_addr: u64,
    pub(super) file_offset: u64,
}

impl RegionMessage {
    const LEN: usize = 32;
    /// The length of a payload that is one region, with padding before it.
    const SINGLE_LEN: usize = 8 + Self::LEN;

    fn read_single(bytes: &[u8; Self::SINGLE_LEN]) -> Self {
        Self::read(&bytes[8..])
    }

    fn read(bytes: &[u8]) -> Self {
        Self {
            guest_addr: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            user_addr: u64_at(bytes, 16),
            file_offset: u64_at(bytes, 24),
        }
    }
}

/// A part of the configuration space. Its size is that of the bytes behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConfigHeader {
    pub(super) offset: u32,
    pub(super) flags: u32,
}

impl ConfigHeader {
    const LEN: usize = 12;

    /// The payload of an answer with these bytes.
    pub(super) fn with(self, bytes: &[u8]) -> Vec<u8> {
        let header = [self.offset, bytes.len() as u32, self.flags].map(u32::to_ne_bytes);
        [header.as_flattened(), bytes].concat()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|index| bytes[at + index]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|index| bytes[at + index]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_has_its_number() {
        for request in Request::ALL {
            assert_eq!(Request::from_code(request as u32), Some(request));
        }
        let known = (0..1000).filter_map(Request::from_code).count();
        assert_eq!(known, Request::ALL.len());
    }

    #[test]
    fn a_payload_has_the_length_of_its_request() {
        let message = |request: Request, len: usize| {
            let header = [request as u32, VERSION, len as u32].map(u32::to_ne_bytes);
            let header = Header::read(header.as_flattened()).unwrap().unwrap();
            Message::new(header, vec![0; len], Vec::new())
        };
        for len in [0, 7, 9] {
            assert!(message(Request::SetFeatures, len).u64().is_err());
        }
        assert!(message(Request::SetFeatures, 8).u64().is_ok());
        assert!(message(Request::GetFeatures, 1).empty().is_err());
        assert!(message(Request::GetFeatures, 0).empty().is_ok());
    }
}
