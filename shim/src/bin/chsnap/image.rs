//! `chsnap image`

use std::{
    ffi::OsString,
    fs,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use chsnap::image::{Ctr, Image, Process, Reference};
use clap::Subcommand;
use serde_json::json;

use crate::{Outcome, print_json};

#[derive(Subcommand)]
pub enum Command {
    /// Make an image of a root file system and import it into containerd
    Import(Box<Import>),
}

#[derive(clap::Args)]
pub struct Import {
    /// ext4 image, directory, or tar (plain, gzip or zstd)
    rootfs: PathBuf,
    /// Name of the image, such as docker.io/library/app:1.0; `ctr run` wants the very same
    #[arg(long, value_name = "REF")]
    name: Reference,
    /// What the image runs, as a JSON array: '["python3","app.py"]'
    #[arg(long, value_name = "JSON", value_parser = command_line, conflicts_with = "args")]
    cmd: Option<CommandLine>,
    /// Environment variable of the image; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = variable)]
    env: Vec<String>,
    /// Working directory of the image
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    workdir: Option<String>,
    /// User of the image, by name or number
    #[arg(long, value_name = "USER[:GROUP]", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    user: Option<String>,
    /// containerd's socket
    #[arg(long, env = "CONTAINERD_ADDRESS", default_value = "/run/containerd/containerd.sock")]
    address: PathBuf,
    /// containerd's namespace
    #[arg(long, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// Snapshotter the image is unpacked into [default: containerd's own]
    #[arg(long)]
    snapshotter: Option<String>,
    /// containerd's command line client
    #[arg(long, value_name = "PATH", default_value = "ctr")]
    ctr: OsString,
    /// Write an OCI archive instead of importing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ctr", "snapshotter"])]
    output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What the image runs, word by word
    #[arg(last = true)]
    args: Vec<String>,
}

#[derive(Clone)]
struct CommandLine(Vec<String>);

fn command_line(text: &str) -> Result<CommandLine, String> {
    match serde_json::from_str::<Vec<String>>(text) {
        Ok(words) if words.first().is_some_and(|program| !program.is_empty()) => Ok(CommandLine(words)),
        Ok(_) => Err("it names no program".into()),
        Err(_) => Err("write a JSON array of texts such as [\"python3\",\"app.py\"], or the words after `--`".into()),
    }
}

fn variable(text: &str) -> Result<String, &'static str> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(text.to_owned()),
        _ => Err("write KEY=VALUE"),
    }
}

fn absolute(text: &str) -> Result<String, &'static str> {
    if text.starts_with('/') { Ok(text.to_owned()) } else { Err("write an absolute path") }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot write the archive {path:?}")]
struct OutputError {
    path: PathBuf,
    source: io::Error,
}

pub fn run(command: Command) -> Outcome {
    let Command::Import(args) = command;
    let process = Process {
        cmd: args.cmd.map_or(args.args, |CommandLine(words)| words),
        env: args.env,
        workdir: args.workdir,
        user: args.user,
    };
    let ctr =
        Ctr { program: args.ctr, address: args.address, namespace: args.namespace, snapshotter: args.snapshotter };
    if args.output.is_none() {
        ctr.check()?;
    }
    tell(&format!("packing {}", args.rootfs.display()));
    let mut image = Image::pack(&args.rootfs, args.name, &process)?;
    if image.layer().skipped > 0 {
        tell(&format!("sockets left out, since an image cannot hold them: {}", image.layer().skipped));
    }
    if process.cmd.is_empty() {
        tell("the image runs nothing by itself: give `ctr run` a command, or import it with one after `--`");
    }
    match &args.output {
        Some(path) => {
            save(&mut image, path).map_err(|source| OutputError { path: path.clone(), source })?;
        }
        None => {
            tell(&format!("importing {} MiB through {}", image.layer().size.div_ceil(1 << 20), ctr.address.display()));
            ctr.import(&mut image)?;
        }
    }
    if args.json {
        let layer = image.layer();
        print_json(&json!({
            "name": image.reference.as_str(),
            "digest": image.digest(),
            "layer": {
                "digest": layer.digest,
                "diff_id": layer.diff_id,
                "media_type": layer.media_type,
                "size": layer.size,
                "entries": layer.entries,
                "skipped": layer.skipped,
            },
        }))?;
    } else {
        writeln!(io::stdout(), "{} {}", image.reference, image.digest())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Progress goes where it does not mix with the result.
fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// By rename, so that half an archive never carries its name.
fn save(image: &mut Image, path: &Path) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().permissions(mode(0o644)).tempfile_in(dir)?;
    image.write(BufWriter::with_capacity(1 << 20, &mut file))?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn mode(bits: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(bits)
}
