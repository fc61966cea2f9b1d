//! Generates the control API from its proto file, and compiles the programs for the kernel.

use std::{env, error::Error, fs, path::Path};

use libbpf_cargo::SkeletonBuilder;
use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    let out = env::var("OUT_DIR")?;
    control(&out)?;
    programs(&out)
}

/// Atomic operations on 32 bits want the third instruction set (kernel 5.12).
fn programs(out: &str) -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=bpf");
    let arch = match env::var("CARGO_CFG_TARGET_ARCH")?.as_str() {
        "x86_64" => "x86",
        "aarch64" => "arm64",
        other => return Err(format!("no name for {other} in libbpf's headers").into()),
    };
    let gnu = format!("{}-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH")?);
    let mut args = vec!["-mcpu=v3".into(), "-Wall".into(), "-Werror".into()];
    args.push(format!("-D__TARGET_ARCH_{arch}"));
    // Where Debian and Ubuntu have asm/types.h.
    args.push(format!("-I/usr/include/{gnu}"));
    for name in ["inspector", "packet_lock"] {
        SkeletonBuilder::new()
            .source(format!("bpf/{name}.bpf.c"))
            .obj(Path::new(out).join(format!("{name}.bpf.o")))
            .clang_args(&args)
            .build()?;
    }
    Ok(())
}

fn control(out: &str) -> Result<(), Box<dyn Error>> {
    let proto = "src/control/control.proto";
    println!("cargo:rerun-if-changed={proto}");
    Codegen::new()
        .out_dir(out)
        .inputs([proto])
        .include("src/control")
        .rust_protobuf()
        .customize(Customize::default())
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // Inner attributes are not allowed where the generated text is included.
    for name in ["control.rs", "control_ttrpc.rs"] {
        let path = Path::new(out).join(name);
        let text = fs::read_to_string(&path)?;
        let kept: Vec<&str> = text
            .lines()
            .filter(|l| !l.starts_with("#![") && !l.starts_with("//!"))
            .collect();
        fs::write(&path, kept.join("\n"))?;
    }
    Ok(())
}
