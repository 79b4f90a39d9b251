//! Generates the ttrpc code from the one `.proto`; needs no protoc.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("gen");
    fs::create_dir_all(&out)?;
    println!("cargo:rerun-if-changed=proto/agent.proto");
    Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // protobuf's own mod.rs leaves the service out, and the files begin with inner attributes, so they cannot be
    // included one by one.
    fs::write(out.join("mod.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")?;
    Ok(())
}
