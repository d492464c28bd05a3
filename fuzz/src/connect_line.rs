//! The CONNECT line and its answer in any pieces, beside a parser that has the whole line. Then the same bytes come over a
//! stream, which keeps what follows the line, and as a message, which must be a line and nothing else.

use std::io::{ErrorKind, Read as _, Write as _};

use arbitrary::{Arbitrary, Unstructured};
use vhost_user_vsock::host::connect_line::{
    Line, MAX_ANSWER, MAX_REQUEST, MAX_SIBLING_REQUEST, Progress, read,
};
use vhost_user_vsock::host::socket::HostSocket;
use vhost_user_vsock::packet::header::PacketType;

use super::stream::pair;

/// Who writes the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The client, its request.
    Client,
    /// The server, its answer.
    Server,
    /// A client that asks for another guest, and says who it is.
    Sibling,
}

impl Role {
    fn keyword(self) -> &'static [u8] {
        match self {
            Self::Client | Self::Sibling => b"CONNECT",
            Self::Server => b"OK",
        }
    }

    fn max_len(self) -> usize {
        match self {
            Self::Client => MAX_REQUEST,
            Self::Server => MAX_ANSWER,
            Self::Sibling => MAX_SIBLING_REQUEST,
        }
    }

    fn line(self) -> Line {
        match self {
            Self::Client => Line::request(),
            Self::Server => Line::answer(),
            Self::Sibling => Line::sibling_request(),
        }
    }
}

/// What is written.
#[derive(Arbitrary, Debug)]
struct Input {
    /// How long the pieces are; the rest comes as one.
    pieces: [u8; 8],
    /// How the line begins, bit by bit.
    beginning: u8,
    rest: Vec<Text>,
}

#[derive(Arbitrary, Debug)]
enum Text {
    Digit(u8),
    Zeros(u8),
    Newline,
    Any(u8),
    Blanks { count: u8, has_return: bool },
}

impl Text {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Digit(digit) => vec![b'0' + digit % 10],
            Self::Zeros(count) => vec![b'0'; usize::from(count % 32)],
            Self::Newline => vec![b'\n'],
            Self::Any(byte) => vec![*byte],
            Self::Blanks { count, has_return } => {
                let mut blanks = vec![b' '; usize::from(count % 4)];
                blanks.extend(has_return.then_some(b'\r'));
                blanks
            }
        }
    }
}

impl Input {
    fn role(&self) -> Role {
        match self.beginning & (2 | 8) {
            0 => Role::Client,
            8 => Role::Sibling,
            _ => Role::Server,
        }
    }

    fn written(&self) -> Vec<u8> {
        let mut written = Vec::new();
        if self.beginning & 1 != 0 {
            written.extend_from_slice(self.role().keyword());
            written.push(b' ');
        }
        if self.beginning & 16 != 0 {
            written.extend_from_slice(b"80 5:");
        }
        if self.beginning & 4 != 0 {
            written.make_ascii_lowercase();
        }
        written.extend(self.rest.iter().flat_map(Text::bytes));
        written
    }
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else {
        return;
    };
    let (role, written) = (input.role(), input.written());
    take_pieces(&input, role, &written);
    read_stream(role, &written);
    read_message(role, &written);
}

/// The line comes in pieces.
fn take_pieces(input: &Input, role: Role, written: &[u8]) {
    let mut line = role.line();
    let mut before = 0;
    let lengths = input.pieces.iter().map(|len| usize::from(*len % 16));
    for len in lengths.chain([usize::MAX]) {
        let end = before + len.min(written.len() - before);
        let expected = match parse(role, &written[..end]) {
            Progress::Complete { port, consumed } => Progress::Complete {
                port,
                consumed: consumed - before,
            },
            other => other,
        };
        let progress = line.feed(&written[before..end]);
        assert_eq!(progress, expected, "{}", written[..end].escape_ascii());
        if let (Progress::Complete { .. }, Role::Sibling) = (progress, role) {
            let caller = line.caller();
            let expected = caller_in(&written[..end]);
            assert_eq!(Some((caller.cid.get(), caller.port.0)), expected);
        }
        if progress != Progress::Incomplete {
            return;
        }
        assert_eq!(line.room(), role.max_len() - end);
        before = end;
    }
}

/// The line comes over a stream.
fn read_stream(role: Role, written: &[u8]) {
    let (socket, mut program) = pair(PacketType::Stream);
    let socket = HostSocket::new(PacketType::Stream, socket);
    program.write_all(written).unwrap();
    let progress = read(&socket, &mut role.line());
    let expected = parse(role, written);
    let Progress::Complete { port, consumed } = expected else {
        return assert_eq!(progress, expected, "{}", written.escape_ascii());
    };
    assert!(matches!(progress, Progress::Complete { port: same, .. } if same == port));
    let mut rest = vec![0; written.len() - consumed];
    assert_eq!(socket.take(&mut rest).unwrap_or(0), rest.len());
    assert_eq!(rest, written[consumed..], "behind the line");
}

/// The line is a message.
fn read_message(role: Role, written: &[u8]) {
    let (socket, mut program) = pair(PacketType::Seqpacket);
    let socket = HostSocket::new(PacketType::Seqpacket, socket);
    assert_eq!(program.write(written).unwrap(), written.len());
    let mut line = role.line();
    let progress = read(&socket, &mut line);
    let expected = match parse(role, written) {
        Progress::Complete { port, consumed } if consumed == written.len() => {
            Progress::Complete { port, consumed }
        }
        _ => Progress::Invalid,
    };
    assert_eq!(progress, expected, "{}", written.escape_ascii());
    // It was taken, and nothing was answered.
    let more = program.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(more, Err(ErrorKind::WouldBlock));
}

/// The model: what these first bytes of a line mean.
pub fn parse(role: Role, written: &[u8]) -> Progress {
    let line = &written[..written.len().min(role.max_len())];
    let end = line.iter().position(|byte| *byte == b'\n');
    let text = &line[..end.unwrap_or(line.len())];
    let keyword = role.keyword();
    let (word, rest) = text.split_at(text.len().min(keyword.len()));
    let (blanks, rest) = split(rest, |byte| byte == b' ');
    let (digits, mut trailer) = split(rest, |byte| byte.is_ascii_digit());
    let mut has_caller = role != Role::Sibling;
    if role == Role::Sibling && !digits.is_empty() {
        match split_caller(trailer) {
            Caller::Part => trailer = b"",
            Caller::Whole(after) => (trailer, has_caller) = (after, true),
            Caller::None => return Progress::Invalid,
        }
    }
    let digits = std::str::from_utf8(digits).unwrap();
    let port = digits.parse::<u32>();
    let is_sound = word.eq_ignore_ascii_case(&keyword[..word.len()])
        && (digits.is_empty() || !blanks.is_empty() && port.is_ok())
        && (trailer.is_empty() || !digits.is_empty())
        && trailer.iter().all(|byte| b" \r".contains(byte));
    match (is_sound, end.filter(|_| has_caller), port) {
        (true, Some(end), Ok(port)) => Progress::Complete {
            port,
            consumed: end + 1,
        },
        (true, None, _) if end.is_none() && line.len() < role.max_len() => Progress::Incomplete,
        _ => Progress::Invalid,
    }
}

/// What a caller's address, behind a blank, may be.
enum Caller<'b> {
    /// It may go on.
    Part,
    /// It is there, and these bytes follow it.
    Whole(&'b [u8]),
    /// This is none.
    None,
}

fn split_caller(bytes: &[u8]) -> Caller<'_> {
    let is_digit = |byte: u8| byte.is_ascii_digit();
    let (blanks, rest) = split(bytes, |byte| byte == b' ');
    let (cid, rest) = split(rest, is_digit);
    let (colon, rest) = rest.split_at(rest.len().min(1));
    let (port, after) = split(rest, is_digit);
    if (blanks.is_empty() && !bytes.is_empty()) || !(is_number(cid) && is_number(port)) {
        Caller::None
    } else if colon.is_empty() {
        Caller::Part
    } else if cid.is_empty() || colon != b":" {
        Caller::None
    } else if port.is_empty() && after.is_empty() {
        Caller::Part
    } else if port.is_empty() {
        Caller::None
    } else {
        Caller::Whole(after)
    }
}

/// Whether these digits, if there are any, are a port or a CID.
fn is_number(digits: &[u8]) -> bool {
    digits.is_empty() || std::str::from_utf8(digits).unwrap().parse::<u32>().is_ok()
}

/// The CID and the port in a sibling's line that is complete.
fn caller_in(line: &[u8]) -> Option<(u64, u32)> {
    let text = std::str::from_utf8(line.split(|byte| *byte == b'\n').next()?).ok()?;
    let (cid, port) = text.split_ascii_whitespace().nth(2)?.split_once(':')?;
    Some((cid.parse().ok()?, port.parse().ok()?))
}

/// The bytes up to the first that is not `wanted`, and the others.
fn split(bytes: &[u8], wanted: impl Fn(u8) -> bool) -> (&[u8], &[u8]) {
    let end = bytes.iter().position(|byte| !wanted(*byte));
    bytes.split_at(end.unwrap_or(bytes.len()))
}
