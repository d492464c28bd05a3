//! The configuration file, which is YAML: the file of `vhost-device-vsock`, with all options of a VM.
//!
//! ```yaml
//! vms:
//!   - guest_cid: 3
//!     socket: /tmp/vhost3.socket
//!     uds_path: /tmp/vm3.vsock
//!     groups: [web, backup]
//!     guest_port:
//!       22: /tmp/vm3-ssh.socket
//! handover_path: /tmp/vms.handover
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::ConfigError;
use super::options::{OptionError, OptionKind, OptionReader, VmOptions};
use super::yaml::{self, Node, Position, Value, YamlError};

/// The longest file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The key of the list of VMs.
const VMS: &str = "vms";

/// The key of [`ProcessOptions::handover_path`].
const HANDOVER_PATH: &str = "handover-path";

/// The options of the process that a file has beside its VMs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ProcessOptions {
    /// Path of the socket at which a successor takes the VMs over.
    pub handover_path: Option<PathBuf>,
}

/// The options of a VM, and where they come from.
#[derive(Debug)]
pub struct VmSource {
    /// The options.
    pub options: VmOptions,
    place: Place,
}

/// Where the options of a VM come from.
#[derive(Debug)]
enum Place {
    /// The only VM of the command line.
    CommandLine,
    /// One of several `--vm`. The number starts at 1.
    Vm(usize),
    File {
        path: PathBuf,
        at: Position,
        /// The names of the options, without dashes before them, and where their values are.
        options: Vec<(String, Position)>,
    },
}

impl VmSource {
    /// The only VM, which has the options of the command line.
    pub fn only(options: VmOptions) -> Self {
        let place = Place::CommandLine;
        Self { options, place }
    }

    /// The VM of the `number`-th `--vm`.
    pub fn numbered(options: VmOptions, number: usize) -> Self {
        let place = Place::Vm(number);
        Self { options, place }
    }

    /// The same mistake, with the place where it was made. Its option has this name.
    pub fn locate(&self, option: Option<&str>, error: ConfigError) -> ConfigError {
        let place = match &self.place {
            Place::CommandLine => return error,
            Place::Vm(number) => format!("--vm number {number}"),
            Place::File { path, at, options } => {
                let mut options = options.iter();
                let given = options.find(|(name, _)| Some(&name[..]) == option);
                let at = given.map_or(*at, |(_, at)| *at);
                if let ConfigError::Missing(option) = error {
                    return ConfigError::File(describe(path, at, &format!("{option} is missing")));
                }
                format!("{}:{at}", path.display())
            }
        };
        let error = Box::new(error);
        ConfigError::At { place, error }
    }
}

/// Reads a configuration file.
///
/// # Errors
/// The file can't be read, or is wrong.
pub fn read(path: &Path) -> Result<(Vec<VmSource>, ProcessOptions), ConfigError> {
    let unreadable =
        |mistake: String| ConfigError::File(format!("--config {}: {mistake}", path.display()));
    let bytes = read_bytes(path).map_err(|error| unreadable(error.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|_| unreadable("this is not UTF-8".into()))?;
    let located = |error: YamlError| ConfigError::File(describe(path, error.at, &error.mistake));
    parse(path, text.trim_start_matches('\u{feff}')).map_err(located)
}

fn describe(path: &Path, at: Position, mistake: &str) -> String {
    format!("{}:{at}: {mistake}", path.display())
}

fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("more than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

/// What a text says, which is that of the file at `path`.
fn parse(path: &Path, text: &str) -> Result<(Vec<VmSource>, ProcessOptions), YamlError> {
    let missing = |at| YamlError::new(at, format!("{VMS} is missing, the list of VMs"));
    let root = yaml::parse(text)?.ok_or_else(|| missing(Position::START))?;
    let mut list = None;
    let mut handover_path = None;
    for (key, value) in pairs(&root, "the file")? {
        let name = scalar(key, "a key")?;
        let place = match &name.replace('_', "-")[..] {
            VMS => &mut list,
            HANDOVER_PATH => &mut handover_path,
            _ => return Err(YamlError::new(key.at, format!("{name}: no such key"))),
        };
        if place.replace(value).is_some() {
            return Err(YamlError::new(key.at, format!("{name}: given twice")));
        }
    }
    let list = list.ok_or_else(|| missing(root.at))?;
    let handover_path = match handover_path {
        Some(node) => path_of(node, HANDOVER_PATH)?,
        None => None,
    };
    Ok((vms(path, list)?, ProcessOptions { handover_path }))
}

/// The path that an option has, if it has a value.
fn path_of(node: &Node, name: &str) -> Result<Option<PathBuf>, YamlError> {
    match &node.value {
        Value::Null => Ok(None),
        _ => match scalar(node, name)? {
            "" => Err(YamlError::new(
                node.at,
                format!("{name}: a path is missing"),
            )),
            path => Ok(Some(path.into())),
        },
    }
}

/// The VMs of the file at `path`.
fn vms(path: &Path, vms: &Node) -> Result<Vec<VmSource>, YamlError> {
    match &vms.value {
        Value::List(list) if !list.is_empty() => list.iter().map(|node| vm(path, node)).collect(),
        Value::List(_) | Value::Null => {
            Err(YamlError::new(vms.at, format!("{VMS}: no VM is given")))
        }
        other => Err(wrong_kind(vms, VMS, "a list of VMs", other)),
    }
}

/// One VM of the file at `path`.
fn vm(path: &Path, node: &Node) -> Result<VmSource, YamlError> {
    let mut reader = OptionReader::default();
    let mut options: Vec<(String, Position)> = Vec::new();
    for (key, value) in pairs(node, "a VM")? {
        let name = scalar(key, "a key")?;
        let option = name.replace('_', "-");
        if options.iter().any(|(seen, _)| *seen == option) {
            let error = OptionError::Twice(name.to_owned());
            return Err(YamlError::new(key.at, error.to_string()));
        }
        options.push((option, value.at));
        set(&mut reader, key, name, value)?;
    }
    let read = reader.finish();
    let options_read = read.map_err(|error| YamlError::new(node.at, error.to_string()))?;
    let path = path.to_owned();
    let at = node.at;
    Ok(VmSource {
        options: options_read,
        place: Place::File { path, at, options },
    })
}

/// Sets an option. One that may have several values takes a list of them, and one with a port and a path in each a map.
fn set(reader: &mut OptionReader, key: &Node, name: &str, value: &Node) -> Result<(), YamlError> {
    let kind = reader.kind(name);
    let kind = kind.map_err(|error| YamlError::new(key.at, error.to_string()))?;
    match (&value.value, kind) {
        // As if it were not there.
        (Value::Null, _) => Ok(()),
        // Without a group there would be the default one.
        (Value::List(list), OptionKind::List) if list.is_empty() && name == "groups" => {
            add(reader, value.at, name, "")
        }
        (Value::List(list), OptionKind::List | OptionKind::PortPaths) => {
            let mut items = list.iter();
            items.try_for_each(|item| set_one(reader, name, item, kind))
        }
        _ => set_one(reader, name, value, kind),
    }
}

/// Sets an option, or adds to one that has a list.
fn set_one(
    reader: &mut OptionReader,
    name: &str,
    value: &Node,
    kind: OptionKind,
) -> Result<(), YamlError> {
    match &value.value {
        Value::Map(map) if kind == OptionKind::PortPaths => {
            for (port, path) in map {
                let text = format!("{}={}", scalar(port, name)?, scalar(path, name)?);
                add(reader, port.at, name, &text)?;
            }
            Ok(())
        }
        _ => add(reader, value.at, name, scalar(value, name)?),
    }
}

fn add(reader: &mut OptionReader, at: Position, name: &str, text: &str) -> Result<(), YamlError> {
    let added = reader.add(name, text);
    added.map_err(|error| YamlError::new(at, error.to_string()))
}

fn pairs<'n>(node: &'n Node, name: &str) -> Result<&'n [(Node, Node)], YamlError> {
    match &node.value {
        Value::Map(map) => Ok(map),
        other => Err(wrong_kind(node, name, "a map", other)),
    }
}

fn scalar<'n>(node: &'n Node, name: &str) -> Result<&'n str, YamlError> {
    match &node.value {
        Value::Scalar(text) => Ok(text),
        other => Err(wrong_kind(node, name, "a single value", other)),
    }
}

fn wrong_kind(node: &Node, name: &str, expected: &str, found: &Value) -> YamlError {
    let mistake = format!("{name}: this is {}, it must be {expected}", found.kind());
    YamlError::new(node.at, mistake)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{PortPath, VsockPort};
    use crate::packet::header::PacketType;

    fn at(port: u32) -> VsockPort {
        VsockPort {
            port,
            packet_type: PacketType::Stream,
        }
    }

    fn read(text: &str) -> Result<Vec<VmOptions>, String> {
        let read = parse(Path::new("f"), text);
        let options = |vms: Vec<VmSource>| vms.into_iter().map(|vm| vm.options).collect();
        read.map(|(vms, _)| options(vms))
            .map_err(|error| error.to_string())
    }

    fn one(option: &str) -> VmOptions {
        let vms = read(&format!("vms:\n- guest_cid: 3\n  {option}\n"));
        vms.unwrap().remove(0)
    }

    #[test]
    fn a_list_is_written_as_a_list_or_in_one() {
        for option in [
            "groups: a+b",
            "groups: [a, b]",
            "groups:\n  - a\n  - b",
            "groups: 'a+b'",
        ] {
            assert_eq!(one(option).groups, ["a", "b"], "{option}");
        }
        assert_eq!(one("groups: 5").groups, ["5"]);
        assert_eq!(one("groups: []").groups, [""]);
        assert_eq!(one("groups:").groups, [""; 0]);
        for option in [
            "forward_listen: 9001",
            "forward-listen: '9001'",
            "forward-listen: [9001]",
        ] {
            assert_eq!(one(option).forward_listen, [at(9001)], "{option}");
        }
        assert_eq!(
            one("forward-listen: 9001+9002").forward_listen,
            [at(9001), at(9002)]
        );
        assert_eq!(one("forward-listen: []").forward_listen, []);
    }

    #[test]
    fn ports_and_paths_are_a_map_or_texts() {
        let port = |port, path: &str| PortPath {
            packet_type: PacketType::Stream,
            port,
            path: path.into(),
        };
        let both = [port(22, "/a"), port(80, "/b=c")];
        for option in [
            "guest_port: {22: /a, 80: /b=c}",
            "guest-port:\n    22: /a\n    80: /b=c",
            "guest_port: [22=/a, 80=/b=c]",
            "guest_port:\n  - 22: /a\n  - 80=/b=c",
        ] {
            assert_eq!(one(option).guest_port, both, "{option}");
        }
        assert_eq!(one("host_port: 80=/x").host_port, [port(80, "/x")]);
        assert_eq!(one("host_port: {}").host_port, []);
        assert_eq!(one("host_port: []").host_port, []);
    }

    #[test]
    fn an_option_of_the_process_stands_beside_the_vms() {
        let path = |text: &str| {
            let text = format!("vms:\n- guest_cid: 3\n{text}\n");
            parse(Path::new("f"), &text).unwrap().1.handover_path
        };
        assert_eq!(path("handover_path: /tmp/h"), Some("/tmp/h".into()));
        assert_eq!(path("handover-path: '/tmp/h'"), Some("/tmp/h".into()));
        assert_eq!(path("handover-path:"), None);
        assert_eq!(path(""), None);
    }

    #[test]
    fn mistakes_have_a_place_and_a_name() {
        for (text, mistake) in [
            ("", "1:1: vms is missing"),
            ("vm: []", "1:1: vm: no such key"),
            ("{}", "1:1: vms is missing"),
            ("- vms", "1:1: the file: this is a list, it must be a map"),
            ("vms:", "1:4: vms: no VM is given"),
            ("vms: []", "1:6: vms: no VM is given"),
            (
                "vms: 3",
                "1:6: vms: this is a single value, it must be a list of VMs",
            ),
            (
                "vms:\n- 3",
                "2:3: a VM: this is a single value, it must be a map",
            ),
            ("vms:\n- guest_cid: 3\nvms: []", "3:1: vms: given twice"),
            (
                "vms:\n- guest_cid: x",
                "2:14: guest_cid=x: not a number in range",
            ),
            (
                "vms:\n- guest_cid: [3]",
                "2:14: guest_cid: this is a list, it must be a single",
            ),
            (
                "vms:\n- guest_cid: 3\n  guest-cid: 3",
                "3:3: guest-cid: given twice",
            ),
            ("vms:\n- group: x", "2:3: group: no such key"),
            ("vms:\n- stats_path: x", "2:3: stats_path: no such key"),
            (
                "vms:\n- handover_path: x",
                "2:3: handover_path: no such key",
            ),
            ("handover-path: ''\nvms: []", "1:16: handover-path: a path"),
            (
                "handover-path: [a]\nvms: []",
                "1:16: handover-path: this is a",
            ),
            ("vms:\n- group: [x]", "2:3: group: no such key"),
            ("vms:\n- [x]: 1", "2:3: a key: this is a list"),
            (
                "vms:\n- groups: {a: b}",
                "2:11: groups: this is a map, it must be a single value",
            ),
            ("vms:\n- groups: [a, [b]]", "2:15: groups: this is a list"),
            (
                "vms:\n- forward_listen: [1, x]",
                "2:23: forward_listen=x: not a number",
            ),
            (
                "vms:\n- guest_port: {x: /a}",
                "2:16: guest_port=x=/a: say PORT=PATH",
            ),
            ("vms:\n- sibling_dir: ''", "2:16: sibling_dir=: a value is"),
        ] {
            let error = read(text).unwrap_err();
            assert!(
                error.contains(mistake),
                "{text:?}: {error} should say {mistake}"
            );
        }
    }
}
