//! YAML as a tree of values, each with its place in the text.
//!
//! Nothing is typed: what `9001` means is for the option to say. Aliases (`*name`) are copies, and since copies of copies grow
//! without a limit, the whole tree has one.

use std::collections::HashMap;
use std::fmt;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span};
use thiserror::Error;

/// The most values that aliases repeat. Those of the text itself are bounded by its length.
const MAX_REPEATED: usize = 100_000;

/// How deep lists and maps may lie in each other.
const MAX_DEPTH: usize = 8;

/// A place in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    line: usize,
    column: usize,
}

impl Position {
    /// The beginning.
    pub(super) const START: Self = Self { line: 1, column: 1 };
}

impl From<&Marker> for Position {
    fn from(marker: &Marker) -> Self {
        Self {
            line: marker.line().max(1),
            column: marker.col() + 1,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A mistake in a text.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{at}: {mistake}")]
pub(super) struct YamlError {
    /// Where.
    pub(super) at: Position,
    /// What is wrong.
    pub(super) mistake: String,
}

impl YamlError {
    /// This mistake at this place.
    pub(super) fn new(at: Position, mistake: impl Into<String>) -> Self {
        let mistake = mistake.into();
        Self { at, mistake }
    }
}

impl From<ScanError> for YamlError {
    fn from(error: ScanError) -> Self {
        Self::new(error.marker().into(), error.info())
    }
}

/// A value and where it begins.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) at: Position,
    pub(super) value: Value,
}

/// A value.
#[derive(Clone, Debug)]
pub(super) enum Value {
    /// Nothing, or one of the words for it.
    Null,
    Scalar(String),
    List(Vec<Node>),
    /// The keys are in the order of the text and may be there twice.
    Map(Vec<(Node, Node)>),
}

impl Value {
    /// What this is, for a message.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Scalar(_) => "a single value",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

/// Reads a text of one document. An empty one has no value.
pub(super) fn parse(text: &str) -> Result<Option<Node>, YamlError> {
    let mut tree = Tree::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = event?;
        tree.take(event, span)?;
    }
    Ok(tree.root)
}

/// The tree as far as it has been read.
#[derive(Default)]
struct Tree {
    root: Option<Node>,
    /// Lists and maps that have not ended, the innermost last.
    open: Vec<Open>,
    /// What aliases can repeat.
    anchors: HashMap<usize, Node>,
    /// How many values aliases have repeated.
    repeated: usize,
    documents: usize,
}

struct Open {
    node: Node,
    anchor: usize,
    /// The key of a map's value that comes next.
    key: Option<Node>,
}

impl Tree {
    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), YamlError> {
        let at = Position::from(&span.start);
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(YamlError::new(at, "a second document, only one is read"));
                }
            }
            Event::Alias(anchor) => {
                let node = self.anchors.get(&anchor);
                // Within itself, what an anchor names has not ended.
                let mistake = || YamlError::new(at, "this alias stands for nothing");
                let node = node.ok_or_else(mistake)?;
                let (nodes, depth) = measure(node);
                self.repeated += nodes;
                if self.repeated > MAX_REPEATED || self.open.len() + depth > MAX_DEPTH + 1 {
                    return Err(YamlError::new(at, "the aliases make this too large"));
                }
                let value = node.value.clone();
                self.add(Node { at, value }, 0);
            }
            Event::Scalar(text, style, anchor, _) => {
                let is_null = style == ScalarStyle::Plain
                    && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                let value = if is_null {
                    Value::Null
                } else {
                    Value::Scalar(text.into_owned())
                };
                self.add(Node { at, value }, anchor);
            }
            Event::SequenceStart(anchor, _) => self.open(at, Value::List(Vec::new()), anchor)?,
            Event::MappingStart(anchor, _) => self.open(at, Value::Map(Vec::new()), anchor)?,
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(ended) = self.open.pop() {
                    self.add(ended.node, ended.anchor);
                }
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
        }
        Ok(())
    }

    fn open(&mut self, at: Position, value: Value, anchor: usize) -> Result<(), YamlError> {
        if self.open.len() == MAX_DEPTH {
            return Err(YamlError::new(at, "too many lists and maps in each other"));
        }
        let (node, key) = (Node { at, value }, None);
        self.open.push(Open { node, anchor, key });
        Ok(())
    }

    /// Adds a value to what it is in.
    fn add(&mut self, node: Node, anchor: usize) {
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(open) => match &mut open.node.value {
                Value::List(list) => list.push(node),
                Value::Map(map) => match open.key.take() {
                    Some(key) => map.push((key, node)),
                    None => open.key = Some(node),
                },
                Value::Null | Value::Scalar(_) => {}
            },
        }
    }
}

/// How many values these are, and how deep.
fn measure(node: &Node) -> (usize, usize) {
    let add = |(nodes, depth): (usize, usize), child: &Node| {
        let (more, deeper) = measure(child);
        (nodes + more, depth.max(deeper + 1))
    };
    match &node.value {
        Value::Null | Value::Scalar(_) => (1, 1),
        Value::List(list) => list.iter().fold((1, 1), add),
        Value::Map(map) => {
            let children = map.iter().flat_map(|(key, value)| [key, value]);
            children.fold((1, 1), add)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The tree in one line, each value with its place.
    fn show(text: &str) -> String {
        fn show_node(node: &Node) -> String {
            let value = match &node.value {
                Value::Null => "null".into(),
                Value::Scalar(text) => text.clone(),
                Value::List(list) => list.iter().map(show_node).collect::<Vec<_>>().join(", "),
                Value::Map(map) => {
                    let pairs = map.iter();
                    let pairs = pairs
                        .map(|(key, value)| format!("{}={}", show_node(key), show_node(value)));
                    pairs.collect::<Vec<_>>().join(", ")
                }
            };
            let value = match &node.value {
                Value::List(_) => format!("[{value}]"),
                Value::Map(_) => format!("{{{value}}}"),
                _ => value,
            };
            format!("{}@{value}", node.at)
        }
        match parse(text) {
            Ok(Some(root)) => show_node(&root),
            Ok(None) => "empty".into(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn values_have_places() {
        assert_eq!(
            show("a: 1\nb:\n  - x y\n  - '2'\n"),
            "1:1@{1:1@a=1:4@1, 2:1@b=3:3@[3:5@x y, 4:5@2]}"
        );
        assert_eq!(show("{a: [1, ~]}"), "1:1@{1:2@a=1:5@[1:6@1, 1:9@null]}");
        assert_eq!(show("a:\nb: ''"), "1:1@{1:1@a=1:2@null, 2:1@b=2:4@}");
        assert_eq!(show(""), "empty");
        assert_eq!(show("# nothing\n"), "empty");
    }

    #[test]
    fn what_is_no_yaml_has_a_place() {
        for (text, place) in [
            ("a: [1\nb: 2", "2:"),
            ("a: b: c", "1:"),
            ("a: 'x", "1:"),
            ("\ta: 1\n- b", ""),
        ] {
            let error = show(text);
            assert!(
                error.starts_with(place) && !error.contains('@'),
                "{text:?}: {error}"
            );
        }
        assert_eq!(
            show("a: 1\n---\nb: 1\n"),
            "2:1: a second document, only one is read"
        );
        assert_eq!(
            show(&"[".repeat(9)),
            "1:9: too many lists and maps in each other"
        );
        assert!(parse(&"[".repeat(1 << 20)).is_err());
        assert!(parse(&"- ".repeat(1 << 20)).is_err());
    }

    #[test]
    fn aliases_are_copies() {
        assert_eq!(show("a: &x 1\nb: *x"), "1:1@{1:1@a=1:4@1, 2:1@b=2:4@1}");
        assert_eq!(show("a: &x [*x]"), "1:8: this alias stands for nothing");
        assert!(parse("a: *y").is_err());
    }

    #[test]
    fn aliases_of_aliases_are_bounded() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..30 {
            let alias = format!("*a{}, ", level - 1).repeat(10);
            bomb += &format!("a{level}: &a{level} [{alias}]\n");
        }
        let error = parse(&bomb).unwrap_err().to_string();
        assert!(error.contains("too large"), "{error}");

        // Within the depth, too.
        let mut wide = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..6 {
            let alias = format!("*a{}, ", level - 1).repeat(60);
            wide += &format!("a{level}: &a{level} [{alias}]\n");
        }
        let error = parse(&wide).unwrap_err().to_string();
        assert!(error.contains("too large"), "{error}");
    }
    #[test]
    fn a_long_file_without_aliases_is_read() {
        let text = "- {a: 1, b: [2, 3]}\n".repeat(50_000);
        let Some(Node {
            value: Value::List(list),
            ..
        }) = parse(&text).unwrap()
        else {
            panic!()
        };
        assert_eq!(list.len(), 50_000);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(parts in prop::collection::vec(
            prop::sample::select(vec![
                "a", "b: ", ": ", "- ", "\n", "\n  ", "\n    ", "[", "]", "{", "}", ", ", "&x ", "*x", "'", "\"", "|\n", ">-\n",
                "!!str ", "!<", "? ", "# c\n", "---\n", "...\n", "%YAML 1.2\n", "~", "\t", "\\", "\u{feff}", "\u{1f600}", "<<: ", "@", "`",
            ]),
            0..60,
        )) {
            let _ = parse(&parts.concat());
        }
    }
}
