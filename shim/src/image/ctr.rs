//! containerd, reached through its own command line: no second implementation of its API is needed for one call.

use std::{
    ffi::OsString,
    io::Read,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Command, Output, Stdio},
    thread,
};

use super::{Image, ImportError};

/// How to reach containerd.
#[derive(Debug, Clone)]
pub struct Ctr {
    /// containerd's command line client.
    pub program: OsString,
    /// containerd's socket.
    pub address: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// Into which snapshotter the image is unpacked; none is containerd's default.
    pub snapshotter: Option<String>,
}

impl Ctr {
    /// Fails where nothing listens at the address or there is no client: packing an image takes a while, and ctr would
    /// retry for longer.
    pub fn check(&self) -> Result<(), ImportError> {
        UnixStream::connect(&self.address)
            .map_err(|source| ImportError::Unreachable { address: self.address.clone(), source })?;
        self.output(Command::new(&self.program).arg("--version")).map(drop)
    }

    /// Streams the image into containerd and makes sure that it is there.
    pub fn import(&self, image: &mut Image) -> Result<(), ImportError> {
        let before = self.digest(image)?;
        let mut command = self.command();
        command.args(["images", "import"]);
        if let Some(snapshotter) = &self.snapshotter {
            // From 2.0 on, ctr leaves unpacking to containerd, which does it for configured snapshotters only.
            let help = self.output(Command::new(&self.program).args(["images", "import", "--help"]))?;
            if String::from_utf8_lossy(&help).contains("--local") {
                command.arg("--local");
            }
            command.args(["--snapshotter", snapshotter]);
        }
        command.arg("-");
        let shown = shown(&command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| ImportError::Ctr { program: self.program.clone(), source })?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (sent, out, err) = thread::scope(|scope| {
            // Both are read while we write: a client that cannot get its words out would not read either.
            let out = scope.spawn(|| read_all(stdout));
            let err = scope.spawn(|| read_all(stderr));
            let sent = stdin.map_or(Ok(()), |stdin| image.write(stdin));
            (sent, out.join().unwrap_or_default(), err.join().unwrap_or_default())
        });
        let status = child.wait().map_err(|source| ImportError::Ctr { program: self.program.clone(), source })?;
        // Where ctr gave up first, its reason is worth more than our broken pipe.
        if !status.success() {
            let message = last_line(&err).or_else(|| last_line(&out)).unwrap_or_else(|| "it said nothing".into());
            // It may have named an image that it then could not unpack.
            if before.is_none() && matches!(self.digest(image), Ok(Some(_))) {
                let _ = self.output(self.command().args(["images", "rm", "--sync", image.reference.as_str()]));
            }
            return Err(ImportError::Failed { command: shown, status, message });
        }
        sent.map_err(|source| ImportError::Send { command: shown, source })?;
        match self.digest(image)? {
            Some(digest) if digest == image.digest() => Ok(()),
            found => Err(ImportError::Mismatch {
                reference: image.reference.to_string(),
                digest: image.digest().to_owned(),
                found: found.unwrap_or_else(|| "no image".into()),
            }),
        }
    }

    /// What containerd has under the image's name.
    fn digest(&self, image: &Image) -> Result<Option<String>, ImportError> {
        let table = self.output(self.command().args(["images", "ls", &format!("name=={}", image.reference)]))?;
        // The table's first line is its heading; its columns are name, type and digest.
        Ok(String::from_utf8_lossy(&table).lines().skip(1).find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(image.reference.as_str())).then(|| words.nth(1).unwrap_or("?").to_owned())
        }))
    }

    fn output(&self, command: &mut Command) -> Result<Vec<u8>, ImportError> {
        let output = command.stdin(Stdio::null()).output();
        let Output { status, stdout, stderr } =
            output.map_err(|source| ImportError::Ctr { program: self.program.clone(), source })?;
        if !status.success() {
            let message = last_line(&stderr).unwrap_or_else(|| "it said nothing".into());
            return Err(ImportError::Failed { command: shown(command), status, message });
        }
        Ok(stdout)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--address").arg(&self.address).args(["--namespace", &self.namespace]);
        command
    }
}

fn shown(command: &Command) -> String {
    let words: Vec<_> =
        [command.get_program()].into_iter().chain(command.get_args()).map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

fn read_all(pipe: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // What was said until it broke off is all there is.
        let _ = pipe.read_to_end(&mut bytes);
    }
    bytes
}

fn last_line(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    Some(line.strip_prefix("ctr: ").unwrap_or(line).to_owned())
}
