//! Writes what belongs beside the program into a folder: its manual page, and completions for bash, zsh and fish.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use clap::{Arg, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use vhost_user_vsock::cli::Args;

const NAME: &str = env!("CARGO_PKG_NAME");

/// When the manual last said something new. To be changed with it.
const DATE: &str = "2026-11-23";

/// What the program is called with, and what its options don't say of themselves.
const SYNOPSIS: &str = include_str!("../dist/manual/synopsis.roff");
const SECTIONS: &str = include_str!("../dist/manual/sections.roff");

fn main() -> io::Result<()> {
    let folder = env::args_os().nth(1);
    let folder = folder.ok_or_else(|| io::Error::other("usage: manual FOLDER"))?;
    let folder = Path::new(&folder);
    fs::create_dir_all(folder)?;
    write_page(&mut File::create(folder.join(format!("{NAME}.1")))?)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Args::command(), NAME, folder)?;
    }
    Ok(())
}

/// The page: what clap knows, and the rest.
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

/// Puts an option's values and other names into its help. clap_mangen leaves the names out, and makes of the values a
/// list that mandoc finds fault with.
fn spell_out(option: Arg) -> Arg {
    let Some(help) = option.get_help().map(ToString::to_string) else {
        return option;
    };
    let values = match option.get_action().takes_values() {
        true => option.get_possible_values(),
        false => Vec::new(),
    };
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
