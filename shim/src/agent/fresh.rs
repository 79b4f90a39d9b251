//! What two machines from one snapshot differ by.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
};

/// Twice what the kernel's random number generator takes in.
const ENTROPY: usize = 64;

/// Random bytes and a UUID that nobody else gets.
#[derive(Clone)]
pub struct Fresh {
    /// For the guest's kernel.
    pub(super) entropy: Vec<u8>,
    /// For whoever has to know that this is another machine now.
    pub(super) epoch: String,
}

impl Fresh {
    /// From the host's kernel.
    ///
    /// # Errors
    /// Where it gives none.
    pub fn new() -> io::Result<Self> {
        let mut entropy = vec![0; ENTROPY];
        File::open("/dev/urandom")?.read_exact(&mut entropy)?;
        let epoch = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        Ok(Self { entropy, epoch: epoch.trim().to_owned() })
    }
}

/// The entropy is a secret of the guest's.
impl fmt::Debug for Fresh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fresh").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_alike_and_none_tells_its_entropy() {
        let (one, other) = (Fresh::new().unwrap(), Fresh::new().unwrap());
        assert_eq!((one.entropy.len(), one.epoch.len()), (chsnap_protocol::MIN_ENTROPY, 36));
        assert!(one.entropy != other.entropy && one.epoch != other.epoch);
        assert_eq!(format!("{one:?}"), format!("Fresh {{ epoch: {:?}, .. }}", one.epoch));
    }
}
