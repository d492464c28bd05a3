//! The line with which a host program says which of the guest's ports it wants, and its answer.
//!
//! ```text
//! client                    server
//! CONNECT 1234\n   -->                    the port that it wants to reach
//!                  <--      OK 61234\n    accepted; the number is the port that it is connected from
//! bytes            <->      bytes
//! ```
//!
//! A client that asks for another guest adds its guest's address: `CONNECT 1234 5:50000\n` is the guest with CID 5 that
//! calls from its port 50000. Servers that don't know this ignore what follows the port, as far as they read a line.
//!
//! A server that refuses closes instead. To a client whose socket is bound to an abstract name that begins with
//! `vhost-user-vsock/connect/`, as that of the command `connect` is, this one first says why: `ERR no_driver\n`, with the name of a
//! [`CallFailure`]. Other clients know of no such line. Firecracker has introduced this protocol. Its other implementations accept
//! more than this one writes, and so does this one: the keyword in any case, several blanks, and a blank or a carriage
//! return before the newline.
//!
//! Both roles are here. The daemon is the server towards host programs, and the client where a connection leads to another
//! daemon's guest; so is the command `connect`.

use std::io::IoSlice;

use serde::{Deserialize, Serialize};

use super::socket::{HostSocket, ReceiveError};
use crate::metrics::counters::CallFailure;
use crate::packet::header::{Cid, PacketType, PeerAddr, PeerPort};
use crate::saved::LoadError;

/// The most bytes that a request line may have, its newline included.
pub const MAX_REQUEST: usize = 32;
/// The most bytes that a sibling's request line may have, its newline included.
pub const MAX_SIBLING_REQUEST: usize = 64;
/// The most bytes that an answer may have, its newline included: a port has at most ten digits.
pub const MAX_ANSWER: usize = "OK 4294967295\n".len();

/// What the abstract name of a client begins with that wants to be told why it is refused.
pub const ASKS_WHY: &str = "vhost-user-vsock/connect/";
/// What such an answer begins with.
const REFUSAL: &str = "ERR ";

/// What is known of a line after some of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The line goes on.
    Incomplete,
    /// The line ended with the `consumed`th of these bytes. What follows is payload.
    Complete {
        /// The port that it names.
        port: u32,
        /// How many of the bytes belong to the line.
        consumed: usize,
    },
    /// This is not such a line, whatever follows.
    Invalid,
}

/// Reads on at a line. What follows it stays in the socket: it is payload. Where the socket carries messages, the line is one.
pub fn read(socket: &HostSocket, line: &mut Line) -> Progress {
    if socket.packet_type() == PacketType::Seqpacket {
        return read_message(socket, line);
    }
    loop {
        let mut bytes = [0; MAX_SIBLING_REQUEST];
        let room = &mut bytes[..line.room()];
        let seen = match socket.peek(room) {
            Ok(0) => return Progress::Invalid,
            Ok(seen) => seen,
            Err(ReceiveError::Empty) => return Progress::Incomplete,
            Err(_) => return Progress::Invalid,
        };
        let progress = line.feed(&room[..seen]);
        let consumed = match progress {
            Progress::Complete { consumed, .. } => consumed,
            Progress::Incomplete => seen,
            Progress::Invalid => return progress,
        };
        // They are there: they were just seen.
        let _ = socket.take(&mut room[..consumed]);
        if progress != Progress::Incomplete {
            return progress;
        }
    }
}

fn read_message(socket: &HostSocket, line: &mut Line) -> Progress {
    match socket.take_message(line.room()) {
        Ok((bytes, len)) => match line.feed(&bytes) {
            Progress::Complete { port, consumed } if consumed == len => {
                Progress::Complete { port, consumed }
            }
            _ => Progress::Invalid,
        },
        Err(ReceiveError::Empty) => Progress::Incomplete,
        Err(_) => Progress::Invalid,
    }
}

/// The request for a port of the guest's.
pub fn request(port: u32) -> String {
    format!("CONNECT {port}\n")
}

/// The request of the guest's program at `caller` for a port of another guest's.
pub fn sibling_request(port: PeerPort, caller: PeerAddr) -> String {
    let PeerAddr { cid, port: from } = caller;
    format!("CONNECT {} {cid}:{}\n", port.0, from.0)
}

/// The answer that a request was accepted: the client is connected from `port`.
pub fn answer(port: u32) -> String {
    format!("OK {port}\n")
}

/// Says why a client is refused, if it wants to be told. To be closed then.
pub fn refuse(socket: &HostSocket, why: CallFailure) {
    if socket.is_peer_named(ASKS_WHY.as_bytes()) {
        let line = format!("{REFUSAL}{}\n", why.name());
        // Nothing was sent before, so there is room. A client that has left need not know.
        let _ = socket.send_bytes(&[IoSlice::new(line.as_bytes())]);
    }
}

/// Why the server has refused, if that is what this answer says.
pub fn refusal(answer: &[u8]) -> Option<CallFailure> {
    let why = answer.strip_prefix(REFUSAL.as_bytes())?;
    let why = why.strip_suffix(b"\n")?;
    CallFailure::ALL
        .into_iter()
        .find(|failure| failure.name().as_bytes() == why)
}

/// Whose line it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A client's request.
    Request,
    /// A sibling's request: the caller's address must follow the port. In those of others it must not.
    SiblingRequest,
    /// A server's answer.
    Answer,
}

impl Role {
    fn keyword(self) -> &'static [u8] {
        match self {
            Self::Request | Self::SiblingRequest => b"CONNECT",
            Self::Answer => b"OK",
        }
    }

    fn max_len(self) -> usize {
        match self {
            Self::Request => MAX_REQUEST,
            Self::SiblingRequest => MAX_SIBLING_REQUEST,
            Self::Answer => MAX_ANSWER,
        }
    }
}

/// Where in its line a parser is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Part {
    /// Behind so many bytes of the keyword.
    Keyword(usize),
    /// Between the keyword and the port.
    Blanks,
    Port,
    /// Between the port and the newline, or the caller's address.
    Trailer,
    /// In the caller's address.
    CallerCid,
    /// Behind its colon.
    Colon,
    CallerPort,
    /// Between the caller's address and the newline.
    End,
}

/// A line of any role, as far as it has come: a keyword, blanks, a port and a newline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    role: Role,
    len: usize,
    part: Part,
    port: u32,
    caller: (u32, u32),
}

impl Line {
    /// A client's request, of at most [`MAX_REQUEST`] bytes.
    pub fn request() -> Self {
        Self::new(Role::Request)
    }

    /// A sibling's request, of at most [`MAX_SIBLING_REQUEST`] bytes.
    pub fn sibling_request() -> Self {
        Self::new(Role::SiblingRequest)
    }

    /// A server's answer, of at most [`MAX_ANSWER`] bytes.
    pub fn answer() -> Self {
        Self::new(Role::Answer)
    }

    fn new(role: Role) -> Self {
        Self {
            role,
            len: 0,
            part: Part::Keyword(0),
            port: 0,
            caller: (0, 0),
        }
    }

    /// Checks a line that was loaded.
    ///
    /// # Errors
    /// It is of another role, or longer than its role allows.
    pub fn check(&self, role: Role) -> Result<(), LoadError> {
        if self.role == role && self.len < role.max_len() {
            Ok(())
        } else {
            Err(LoadError::Invalid("a line that can't be"))
        }
    }

    /// Who calls, as a sibling's request that is complete says. The CID may be anything.
    pub fn caller(&self) -> PeerAddr {
        let (cid, port) = self.caller;
        PeerAddr {
            cid: Cid::from_raw(cid.into()),
            port: PeerPort(port),
        }
    }

    /// How many more bytes the line may have.
    pub fn room(&self) -> usize {
        self.role.max_len() - self.len
    }

    /// Takes the next bytes, in pieces of any size.
    pub fn feed(&mut self, bytes: &[u8]) -> Progress {
        for (index, byte) in bytes.iter().enumerate() {
            self.len += 1;
            let Some(part) = self.next(*byte) else {
                return Progress::Invalid;
            };
            if *byte == b'\n' {
                return Progress::Complete {
                    port: self.port,
                    consumed: index + 1,
                };
            }
            if self.len == self.role.max_len() {
                return Progress::Invalid;
            }
            self.part = part;
        }
        Progress::Incomplete
    }

    /// Where the parser is behind this byte, or nothing if it does not belong there.
    fn next(&mut self, byte: u8) -> Option<Part> {
        let keyword = self.role.keyword();
        let has_caller = self.role == Role::SiblingRequest;
        match (self.part, byte) {
            (Part::Keyword(at), byte) if at < keyword.len() => byte
                .eq_ignore_ascii_case(&keyword[at])
                .then_some(Part::Keyword(at + 1)),
            (Part::Keyword(_) | Part::Blanks, b' ') => Some(Part::Blanks),
            (Part::Blanks | Part::Port, b'0'..=b'9') => {
                self.port = append(self.port, byte)?;
                Some(Part::Port)
            }
            (Part::Port | Part::Trailer, b' ') => Some(Part::Trailer),
            (Part::Trailer | Part::CallerCid, b'0'..=b'9') if has_caller => {
                self.caller.0 = append(self.caller.0, byte)?;
                Some(Part::CallerCid)
            }
            (Part::CallerCid, b':') => Some(Part::Colon),
            (Part::Colon | Part::CallerPort, b'0'..=b'9') => {
                self.caller.1 = append(self.caller.1, byte)?;
                Some(Part::CallerPort)
            }
            (Part::Port | Part::Trailer, b'\r' | b'\n') if !has_caller => Some(Part::Trailer),
            (Part::CallerPort | Part::End, b' ' | b'\r' | b'\n') => Some(Part::End),
            _ => None,
        }
    }
}

/// A number with one more digit, if it can have that.
fn append(number: u32, digit: u8) -> Option<u32> {
    number.checked_mul(10)?.checked_add(u32::from(digit - b'0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::message_pair;
    use proptest::prelude::*;
    use std::io::Write;

    fn parse(line: &[u8]) -> Progress {
        Line::request().feed(line)
    }

    fn complete(port: u32, consumed: usize) -> Progress {
        Progress::Complete { port, consumed }
    }

    #[test]
    fn a_refusal_has_a_known_reason() {
        for failure in CallFailure::ALL {
            let line = format!("ERR {}\n", failure.name());
            assert_eq!(refusal(line.as_bytes()), Some(failure));
            assert_eq!(refusal(line.trim_end().as_bytes()), None);
            assert_eq!(Line::answer().feed(line.as_bytes()), Progress::Invalid);
        }
        for line in ["", "ERR \n", "ERR new\n", "err limit\n", "OK 1\n"] {
            assert_eq!(refusal(line.as_bytes()), None, "{line:?}");
        }
    }

    #[test]
    fn a_line_names_a_port_and_leaves_the_payload() {
        assert_eq!(parse(b"CONNECT 1234\nhello"), complete(1234, 13));
        assert_eq!(parse(b"CONNECT 4294967295\n"), complete(u32::MAX, 19));
    }

    #[test]
    fn lines_are_accepted_as_others_write_them() {
        for line in [
            &b"connect 80\n"[..],
            b"Connect 80\n",
            b"CONNECT   80\n",
            b"CONNECT 80 \n",
            b"CONNECT 80\r\n",
            b"connect  80 \r\n",
        ] {
            let shown = line.escape_ascii();
            assert_eq!(parse(line), complete(80, line.len()), "{shown}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_its_first_wrong_byte() {
        for line in [
            &b"CONNECT\n"[..],
            b"CONNECT \n",
            b"CONNECT\t1\n",
            b"CONNECT -1\n",
            b"CONNECT 12x",
            b"CONNECT 1 2",
            b"CONNECT 4294967296",
            b" CONNECT 1\n",
            b"GET / HTTP/1.1\r\n",
            b"\r\n",
            b"\n",
            b"\0",
        ] {
            assert_eq!(parse(line), Progress::Invalid, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn a_line_has_at_most_32_bytes() {
        let line = |zeros| [b"CONNECT ".to_vec(), vec![b'0'; zeros], b"1\n".to_vec()].concat();
        assert_eq!(line(22).len(), MAX_REQUEST);
        assert_eq!(parse(&line(22)), complete(1, MAX_REQUEST));
        assert_eq!(parse(&line(23)), Progress::Invalid);
        assert_eq!(parse(&line(23)[..MAX_REQUEST]), Progress::Invalid);
        assert_eq!(parse(&[b' '; 40]), Progress::Invalid);
    }

    fn parse_sibling(line: &[u8]) -> Option<(u32, u64, u32)> {
        let mut parser = Line::sibling_request();
        let Progress::Complete { port, consumed } = parser.feed(line) else {
            return None;
        };
        assert_eq!(consumed, line.len());
        let caller = parser.caller();
        Some((port, caller.cid.get(), caller.port.0))
    }

    #[test]
    fn a_sibling_says_who_calls() {
        for line in [
            &b"CONNECT 80 5:50000\n"[..],
            b"connect  80  5:50000 \r\n",
            b"CONNECT 080 05:050000\n",
        ] {
            assert_eq!(parse_sibling(line), Some((80, 5, 50000)));
            assert_eq!(parse(line), Progress::Invalid, "not for the host's socket");
        }
        let longest = b"CONNECT 4294967295 4294967295:4294967295\n";
        let max = u32::MAX;
        assert_eq!(parse_sibling(longest), Some((max, max.into(), max)));
        for line in [
            &b"CONNECT 80\n"[..],
            b"CONNECT 80 \n",
            b"CONNECT 80 5\n",
            b"CONNECT 80 5:\n",
            b"CONNECT 80 :5\n",
            b"CONNECT 80 5:6:7\n",
            b"CONNECT 80 5 :6\n",
            b"CONNECT 80 5: 6\n",
            b"CONNECT 80\r5:6\n",
            b"CONNECT 80:5:6\n",
            b"CONNECT 80 5:6 7\n",
            b"CONNECT 80 4294967296:6\n",
            b"CONNECT 80 5:4294967296\n",
            b"CONNECT  5:6\n",
        ] {
            assert_eq!(parse_sibling(line), None, "{}", line.escape_ascii());
        }
        let zeros = [b"CONNECT 80 5:".to_vec(), vec![b'0'; 64], b"1\n".to_vec()].concat();
        assert_eq!(parse_sibling(&zeros), None);
        // An answer has no address.
        assert_eq!(Line::answer().feed(b"OK 80 5:6\n"), Progress::Invalid);
    }

    #[test]
    fn a_message_is_the_whole_line() {
        let (socket, mut program) = message_pair();
        let mut first = |message: &[u8]| {
            assert_eq!(program.write(message).unwrap(), message.len());
            read(&socket, &mut Line::request())
        };
        assert_eq!(first(b"CONNECT 80\n"), complete(80, 11));
        for message in [
            &b""[..],
            b"CONNECT 80",
            b"CONNECT 80\nhello",
            b"CONNECT 80\n\n",
            &[b' '; MAX_REQUEST + 1],
        ] {
            assert_eq!(first(message), Progress::Invalid);
        }
        // Every one of them was taken.
        assert_eq!(first(b"connect 9\r\n"), complete(9, 11));
        assert_eq!(read(&socket, &mut Line::request()), Progress::Incomplete);
        drop(program);
        assert_eq!(read(&socket, &mut Line::request()), Progress::Invalid);
    }

    proptest! {
        #[test]
        fn a_sibling_is_understood(numbers in any::<(u32, u32, u32)>(), cut in 0usize..41) {
            let (port, cid, from) = numbers;
            let caller = PeerAddr { cid: Cid::from_raw(cid.into()), port: PeerPort(from) };
            let line = sibling_request(PeerPort(port), caller);
            let mut parser = Line::sibling_request();
            let (first, rest) = line.split_at(cut.min(line.len() - 1));
            prop_assert_eq!(parser.feed(first.as_bytes()), Progress::Incomplete);
            prop_assert_eq!(parser.feed(rest.as_bytes()), complete(port, rest.len()));
            prop_assert_eq!(parser.caller(), caller);
        }

        #[test]
        fn pieces_do_not_matter(port in any::<u32>(), cuts in prop::collection::vec(1usize..8, 40)) {
            let line = request(port);
            let mut parser = Line::request();
            let mut rest = line.as_bytes();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                let progress = parser.feed(piece);
                rest = after;
                if rest.is_empty() {
                    prop_assert_eq!(progress, complete(port, piece.len()));
                    return Ok(());
                }
                prop_assert_eq!(progress, Progress::Incomplete);
            }
        }

        #[test]
        fn no_bytes_harm_it(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut parser = Line::request();
            for byte in bytes {
                if parser.feed(&[byte]) != Progress::Incomplete {
                    break;
                }
                prop_assert!(parser.room() > 0);
            }
        }

        #[test]
        fn a_client_understands_the_answer(port in any::<u32>()) {
            let line = answer(port);
            prop_assert!(line.len() <= MAX_ANSWER);
            let progress = Line::answer().feed(line.as_bytes());
            prop_assert_eq!(progress, complete(port, line.len()));
        }
    }
}
