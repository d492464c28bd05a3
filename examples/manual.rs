//! Generates the manual page, and completions for bash, zsh and fish, into a directory.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use clap::{Arg, Command, CommandFactory, ValueHint};
use clap_complete::{Shell, generate, generate_to};
use clap_mangen::Man;
use vhost_user_vsock::cli::Args;

const NAME: &str = env!("CARGO_PKG_NAME");

/// When the contents of the manual were last changed. To be updated with them.
const DATE: &str = "2026-11-29";

/// The sections that clap can't generate.
const SYNOPSIS: &str = include_str!("../dist/manual/synopsis.roff");
const SECTIONS: &str = include_str!("../dist/manual/sections.roff");

fn main() -> io::Result<()> {
    let directory = env::args_os().nth(1);
    let directory = directory.ok_or_else(|| io::Error::other("usage: manual DIRECTORY"))?;
    let directory = Path::new(&directory);
    fs::create_dir_all(directory)?;
    write_page(&mut File::create(directory.join(format!("{NAME}.1")))?)?;
    let mut command = Args::command().mut_args(hint);
    command = command.mut_subcommands(|command| command.mut_args(hint));
    generate_to(Shell::Zsh, &mut command, NAME, directory)?;
    let bash = bash(&script(Shell::Bash, &mut command));
    fs::write(directory.join(format!("{NAME}.bash")), bash)?;
    let fish = fish(&script(Shell::Fish, &mut command));
    fs::write(directory.join(format!("{NAME}.fish")), fish)
}

fn script(shell: Shell, command: &mut Command) -> String {
    let mut text = Vec::new();
    generate(shell, command, NAME, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// clap_complete 4.6 has two names for the subcommands of a program with a hyphen, one where it sets them and one where it looks
/// for them.
fn bash(script: &str) -> String {
    let [looked_for, set] = ["__subcmd__", "__"].map(|hyphen| NAME.replace('-', hyphen));
    script.replace(&looked_for, &set)
}

/// It does not know its options either where the last one has no value yet.
fn fish(script: &str) -> String {
    let parse = "-- $cmd 2>/dev/null\n    or return";
    script.replace(&format!("{parse}\n"), &format!("{parse} 0\n"))
}

/// What is typed for an option that is neither a path nor one of a few words can't be completed. Shells offer files otherwise.
fn hint(option: Arg) -> Arg {
    let is_free = option.get_action().takes_values() && option.get_possible_values().is_empty();
    match option.get_value_hint() {
        ValueHint::Unknown if is_free => option.value_hint(ValueHint::Other),
        _ => option,
    }
}

/// Writes the manual page: what clap generates, and the other sections.
fn write_page(page: &mut impl Write) -> io::Result<()> {
    let man = Man::new(Args::command().mut_args(spell_out))
        .title("VHOST-USER-VSOCK")
        .date(DATE);
    man.render_title(page)?;
    man.render_name_section(page)?;
    page.write_all(SYNOPSIS.as_bytes())?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    page.write_all(SECTIONS.as_bytes())
}

/// Adds an option's values and aliases to its help. clap_mangen omits the aliases, and its list of values fails mandoc's
/// lint.
fn spell_out(option: Arg) -> Arg {
    let Some(help) = option.get_help().map(ToString::to_string) else {
        return option;
    };
    if !option.get_action().takes_values() {
        return option;
    }
    let values = option.get_possible_values();
    let values: Vec<&str> = values.iter().map(|value| value.get_name()).collect();
    let names = option.get_visible_aliases().unwrap_or_default();
    let names: Vec<String> = names.iter().map(|name| format!("--{name}")).collect();
    let option = option.hide_possible_values(true);
    match (&values[..], &names[..]) {
        ([], []) => option,
        (_, []) => option.help(format!("{help} ({})", values.join(", "))),
        _ => option.help(format!("{help} (also {})", names.join(", "))),
    }
}
