//! The CONNECT line in any pieces, beside a parser that has the whole line at once.

use arbitrary::{Arbitrary, Unstructured};
use vhost_user_vsock::host::connect_line::{Handshake, Progress};

/// What a host program writes first.
#[derive(Arbitrary, Debug)]
struct Input {
    /// How long the pieces are; the rest comes as one.
    pieces: [u8; 8],
    /// Most lines begin well.
    keyword: bool,
    rest: Vec<Text>,
}

#[derive(Arbitrary, Debug)]
enum Text {
    Digit(u8),
    Zeros(u8),
    Newline,
    Any(u8),
}

impl Text {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Digit(digit) => vec![b'0' + digit % 10],
            Self::Zeros(count) => vec![b'0'; usize::from(count % 32)],
            Self::Newline => vec![b'\n'],
            Self::Any(byte) => vec![*byte],
        }
    }
}

/// Runs the target.
pub fn run(bytes: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else {
        return;
    };
    let keyword = if input.keyword { &b"CONNECT "[..] } else { b"" };
    let rest: Vec<u8> = input.rest.iter().flat_map(Text::bytes).collect();
    let written = [keyword, &rest].concat();
    let mut handshake = Handshake::default();
    let mut before = 0;
    let lengths = input.pieces.iter().map(|len| usize::from(*len % 16));
    for len in lengths.chain([usize::MAX]) {
        let end = before + len.min(written.len() - before);
        let expected = match model(&written[..end]) {
            Progress::Complete { port, consumed } => Progress::Complete {
                port,
                consumed: consumed - before,
            },
            other => other,
        };
        let progress = handshake.feed(&written[before..end]);
        assert_eq!(progress, expected, "{}", written[..end].escape_ascii());
        if progress != Progress::Incomplete {
            return;
        }
        assert_eq!(handshake.room(), 32 - end, "of 32 bytes");
        before = end;
    }
}

/// What is to be said of all the bytes so far.
fn model(written: &[u8]) -> Progress {
    let line = &written[..written.len().min(32)];
    let end = line.iter().position(|byte| *byte == b'\n');
    let Some(text) = line[..end.unwrap_or(line.len())].strip_prefix(b"CONNECT ") else {
        let so_far = end.is_none() && b"CONNECT ".starts_with(line);
        return if so_far {
            Progress::Incomplete
        } else {
            Progress::Invalid
        };
    };
    let text = std::str::from_utf8(text).unwrap_or("not even text");
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    match (text.parse(), end) {
        (Ok(port), Some(end)) if is_number => Progress::Complete {
            port,
            consumed: end + 1,
        },
        (Ok(_), None) if is_number && line.len() < 32 => Progress::Incomplete,
        (Err(_), None) if text.is_empty() => Progress::Incomplete,
        _ => Progress::Invalid,
    }
}
