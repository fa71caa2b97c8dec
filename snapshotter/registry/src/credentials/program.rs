//! Asking a program: a question on its input, an answer on its output.

use std::io;
use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// Whether `program` succeeded, and its output, of which no more than `limit` bytes are read. It is killed if this
/// future is dropped.
pub async fn ask(program: &mut Command, question: &str, limit: u64) -> io::Result<(bool, Vec<u8>)> {
    let mut child = program
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // A program that doesn't read its input says on its output what is wrong.
        let _ = input.write_all(question.as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(limit).read_to_end(&mut output).await?;
    }
    let status = child.wait().await?;
    Ok((status.success(), output))
}
