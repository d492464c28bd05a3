//! The line with which a host program says which of the guest's ports it wants, and its answer.
//!
//! ```text
//! client                    server
//! CONNECT 1234\n   -->                    the port that it wants to reach
//!                  <--      OK 61234\n    accepted; the number is the port that it is connected from
//! bytes            <->      bytes
//! ```
//!
//! A server that refuses closes instead. Firecracker has introduced this protocol. Its other implementations accept
//! more than this one writes, and so does this one: the keyword in any case, several blanks, and a blank or a carriage
//! return before the newline.
//!
//! Both roles are here. The daemon is the server towards host programs; the command `connect` is a client.

use super::socket::{HostSocket, ReceiveError};

/// The most bytes that a request line may have, its newline included.
pub const MAX_REQUEST: usize = 32;
/// The most bytes that an answer may have, its newline included: a port has at most ten digits.
pub const MAX_ANSWER: usize = "OK 4294967295\n".len();

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

/// Reads on at a line. What follows it stays in the socket: it is payload.
pub fn read(socket: &HostSocket, line: &mut Line) -> Progress {
    loop {
        let mut bytes = [0; MAX_REQUEST];
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

/// The request for a port of the guest's.
pub fn request(port: u32) -> String {
    format!("CONNECT {port}\n")
}

/// The answer that a request was accepted: the client is connected from `port`.
pub fn answer(port: u32) -> String {
    format!("OK {port}\n")
}

/// Where in its line a parser is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Behind so many bytes of the keyword.
    Keyword(usize),
    /// Between the keyword and the port.
    Blanks,
    Port,
    /// Between the port and the newline.
    Trailer,
}

/// A line of either role, as far as it has come: a keyword, blanks, a port and a newline.
#[derive(Clone, Debug)]
pub struct Line {
    keyword: &'static [u8],
    max_len: usize,
    len: usize,
    part: Part,
    port: u32,
}

impl Line {
    /// A client's request, of at most [`MAX_REQUEST`] bytes.
    pub fn request() -> Self {
        Self::new(b"CONNECT", MAX_REQUEST)
    }

    /// A server's answer, of at most [`MAX_ANSWER`] bytes.
    pub fn answer() -> Self {
        Self::new(b"OK", MAX_ANSWER)
    }

    fn new(keyword: &'static [u8], max_len: usize) -> Self {
        Self {
            keyword,
            max_len,
            len: 0,
            part: Part::Keyword(0),
            port: 0,
        }
    }

    /// How many more bytes the line may have.
    pub fn room(&self) -> usize {
        self.max_len - self.len
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
            if self.len == self.max_len {
                return Progress::Invalid;
            }
            self.part = part;
        }
        Progress::Incomplete
    }

    /// Where the parser is behind this byte, or nothing if it does not belong there.
    fn next(&mut self, byte: u8) -> Option<Part> {
        match (self.part, byte) {
            (Part::Keyword(at), byte) if at < self.keyword.len() => byte
                .eq_ignore_ascii_case(&self.keyword[at])
                .then_some(Part::Keyword(at + 1)),
            (Part::Keyword(_) | Part::Blanks, b' ') => Some(Part::Blanks),
            (Part::Blanks | Part::Port, b'0'..=b'9') => {
                let digit = u32::from(byte - b'0');
                self.port = self.port.checked_mul(10)?.checked_add(digit)?;
                Some(Part::Port)
            }
            (Part::Port | Part::Trailer, b' ' | b'\r' | b'\n') => Some(Part::Trailer),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &[u8]) -> Progress {
        Line::request().feed(line)
    }

    fn complete(port: u32, consumed: usize) -> Progress {
        Progress::Complete { port, consumed }
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

    proptest! {
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
