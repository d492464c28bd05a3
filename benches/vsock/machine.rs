//! What the figures were measured on, and with.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::daemon::Binary;
use crate::uml;

/// The machine, the programs and the day.
pub struct Machine {
    cpu: String,
    cpus: usize,
    memory_gib: f64,
    kernel: String,
    qemu: Option<String>,
    guest_kernel: Option<String>,
    date: String,
    /// The daemons' names, options and versions.
    daemons: Vec<[String; 3]>,
}

impl Machine {
    /// Asks the machine and the daemons.
    pub fn describe(binaries: &[Binary]) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim().to_string())
            })
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib = memory.and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
        let daemons = binaries.iter().map(|binary| {
            let version = first_line(&binary.path.to_string_lossy(), "--version");
            let options = binary.args.join(" ");
            [binary.name.clone(), options, version.unwrap_or_default()]
        });
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.into()),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: kib.unwrap_or_default() / f64::from(1 << 20),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
            qemu: qemu(),
            guest_kernel: first_line(uml::KERNEL, "--version"),
            date: first_line("date", "+%F").unwrap_or_default(),
            daemons: daemons.collect(),
        }
    }

    /// The machine in one line.
    pub fn line(&self) -> String {
        let qemu = match &self.qemu {
            Some(version) => format!("QEMU {version}"),
            None => "no QEMU".into(),
        };
        let guest = match &self.guest_kernel {
            Some(version) => format!("Linux guest: UML {version}"),
            None => "no Linux guest".into(),
        };
        format!(
            "{}, {} CPUs, {:.0} GiB · Linux {} · {qemu} · {guest} · {}",
            self.cpu, self.cpus, self.memory_gib, self.kernel, self.date
        )
    }

    /// The machine and each daemon with its options, a line for each.
    pub fn text(&self) -> String {
        let mut text = self.line();
        for [name, options, version] in &self.daemons {
            let options = if options.is_empty() {
                "its defaults"
            } else {
                options
            };
            text += &format!("\n{name}: {version}, {options}");
        }
        text
    }

    /// The same for a program.
    pub fn json(&self) -> Value {
        let daemons = self.daemons.iter();
        let daemons: Vec<Value> = daemons
            .map(|[name, options, version]| {
                json!({ "name": name, "options": options, "version": version })
            })
            .collect();
        json!({
            "cpu": self.cpu,
            "cpus": self.cpus,
            "memory_gib": self.memory_gib.round(),
            "kernel": self.kernel,
            "qemu": self.qemu,
            "guest_kernel": self.guest_kernel,
            "date": self.date,
            "daemons": daemons,
        })
    }
}

/// The version of the QEMU that is installed.
fn qemu() -> Option<String> {
    let program = format!("qemu-system-{}", std::env::consts::ARCH);
    let line = first_line(&program, "--version")?;
    let version = line.strip_prefix("QEMU emulator version ")?;
    version.split(' ').next().map(Into::into)
}

/// The first line that a program prints.
fn first_line(program: &str, option: &str) -> Option<String> {
    let output = Command::new(program).arg(option).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().map(Into::into)
}
