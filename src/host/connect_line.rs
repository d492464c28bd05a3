//! The line with which a host program says which guest port it wants: `CONNECT 1234\n`.

/// The most bytes a line may have, its newline among them.
const MAX_LINE: usize = 32;

const KEYWORD: &[u8] = b"CONNECT ";

/// What is known after some more bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The line has not ended yet.
    Incomplete,
    /// The line ended with the `consumed`th of these bytes. What follows it is payload.
    Complete {
        /// The guest port.
        port: u32,
        /// How many of the bytes belong to the line.
        consumed: usize,
    },
    /// This is no such line, and more bytes will not make it one.
    Invalid,
}

/// The line as far as it has come.
#[derive(Debug, Default)]
pub struct Handshake {
    seen: usize,
    port: Option<u32>,
}

impl Handshake {
    /// How many bytes the line may still have.
    pub fn room(&self) -> usize {
        MAX_LINE - self.seen
    }

    /// Takes the next bytes of the line, in pieces of any size.
    pub fn feed(&mut self, bytes: &[u8]) -> Progress {
        for (index, byte) in bytes.iter().enumerate() {
            let at = self.seen;
            self.seen += 1;
            let expected = match (at, *byte) {
                (at, byte) if at < KEYWORD.len() => byte == KEYWORD[at],
                (_, digit @ b'0'..=b'9') => self.append(digit - b'0'),
                (_, b'\n') => {
                    return self
                        .port
                        .map_or(Progress::Invalid, |port| Progress::Complete {
                            port,
                            consumed: index + 1,
                        });
                }
                _ => false,
            };
            if !expected || self.seen == MAX_LINE {
                return Progress::Invalid;
            }
        }
        Progress::Incomplete
    }

    /// Appends a digit to the port; false where it leaves a port's range.
    fn append(&mut self, digit: u8) -> bool {
        self.port = self
            .port
            .unwrap_or(0)
            .checked_mul(10)
            .and_then(|port| port.checked_add(u32::from(digit)));
        self.port.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &[u8]) -> Progress {
        Handshake::default().feed(line)
    }

    #[test]
    fn a_line_names_a_port_and_leaves_the_payload() {
        assert_eq!(
            parse(b"CONNECT 1234\nhello"),
            Progress::Complete {
                port: 1234,
                consumed: 13
            }
        );
        assert_eq!(
            parse(b"CONNECT 4294967295\n"),
            Progress::Complete {
                port: u32::MAX,
                consumed: 19
            }
        );
    }

    #[test]
    fn anything_else_is_refused_with_its_first_wrong_byte() {
        for line in [
            &b"connect 1\n"[..],
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT  1\n",
            b"CONNECT 1 \n",
            b"CONNECT 1\r\n",
            b"CONNECT -1\n",
            b"CONNECT 12x",
            b"CONNECT 4294967296",
            b"GET / HTTP/1.1\r\n",
            b"\n",
            b"\0",
        ] {
            assert_eq!(parse(line), Progress::Invalid, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn a_line_has_at_most_32_bytes() {
        let line = |zeros| [b"CONNECT ".to_vec(), vec![b'0'; zeros], b"1\n".to_vec()].concat();
        assert_eq!(line(22).len(), MAX_LINE);
        assert_eq!(
            parse(&line(22)),
            Progress::Complete {
                port: 1,
                consumed: MAX_LINE
            }
        );
        assert_eq!(parse(&line(23)), Progress::Invalid);
        assert_eq!(parse(&line(23)[..MAX_LINE]), Progress::Invalid);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(port in any::<u32>(), cuts in prop::collection::vec(1usize..8, 40)) {
            let line = format!("CONNECT {port}\n");
            let mut handshake = Handshake::default();
            let mut rest = line.as_bytes();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                let progress = handshake.feed(piece);
                rest = after;
                if rest.is_empty() {
                    prop_assert_eq!(progress, Progress::Complete { port, consumed: piece.len() });
                    return Ok(());
                }
                prop_assert_eq!(progress, Progress::Incomplete);
            }
        }

        #[test]
        fn no_bytes_harm_it(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut handshake = Handshake::default();
            for byte in bytes {
                if handshake.feed(&[byte]) != Progress::Incomplete {
                    break;
                }
                prop_assert!(handshake.room() > 0);
            }
        }
    }
}
