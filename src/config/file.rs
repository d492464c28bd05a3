//! The options of VMs and where they come from.

use std::path::Path;

use super::ConfigError;
use super::options::VmOptions;

/// The options of a VM, and where they come from.
#[derive(Debug)]
pub struct VmSource {
    /// The options.
    pub options: VmOptions,
    /// The place, for messages, if there is more than one VM.
    pub place: Option<String>,
}

impl VmSource {
    /// Options that come from the command line.
    pub fn new(options: VmOptions) -> Self {
        let place = None;
        Self { options, place }
    }

    /// The same mistake, with the place where the option of this name is given.
    pub fn locate(&self, option: Option<&str>, error: ConfigError) -> ConfigError {
        let _ = option;
        match &self.place {
            Some(place) => ConfigError::At {
                place: place.clone(),
                error: Box::new(error),
            },
            None => error,
        }
    }
}

/// Reads a configuration file.
///
/// # Errors
/// It can't be read, or is wrong.
pub fn read(path: &Path) -> Result<Vec<VmSource>, ConfigError> {
    Err(ConfigError::File(format!(
        "--config {}: not yet",
        path.display()
    )))
}
