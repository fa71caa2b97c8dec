//! Reads `/proc/self/mountinfo` (proc_pid_mountinfo(5)). Pure.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One line of mountinfo, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// `major:minor` of the mounted file system; also the name of its backing device information.
    pub device: String,
    pub mount_point: PathBuf,
    /// `fuse.skimmer` and the like.
    pub file_system: String,
    /// What was mounted, in the file system's own words.
    pub source: PathBuf,
}

/// The lines of `text` that can be read; others are passed over.
pub fn parse(text: &[u8]) -> impl Iterator<Item = Line> {
    text.split(|byte| *byte == b'\n').filter_map(line)
}

/// `36 35 98:0 /root /mount/point rw,noatime shared:1 - type source options`
fn line(text: &[u8]) -> Option<Line> {
    let mut fields = text.split(|byte| *byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let path = |field| PathBuf::from(OsString::from_vec(unescape(field)));
    let mount_point = path(fields.nth(1)?);
    fields.find(|field| *field == b"-")?;
    let file_system = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let source = path(fields.next()?);
    Some(Line { device, mount_point, file_system, source })
}

/// Space, tab, newline and backslash are written `\040`, `\011`, `\012`, `\134`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        match (byte, octal(after)) {
            (b'\\', Some((value, after))) => {
                out.push(value);
                rest = after;
            }
            _ => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

/// The byte that three octal digits name, and what follows them.
fn octal(text: &[u8]) -> Option<(u8, &[u8])> {
    let (digits, rest) = text.split_at_checked(3)?;
    let value = digits.iter().try_fold(0u32, |n, digit| match digit {
        b'0'..=b'7' => Some(n * 8 + u32::from(digit - b'0')),
        _ => None,
    })?;
    Some((u8::try_from(value).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let text = b"22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n\
            40 22 0:52 / /a\\040b/m/7 ro master:1 propagate_from:2 - fuse.skimmer skimmer\\040x ro,user_id=0\n\
            41 22 8:1 / /odd\\9\\ rw - ext4 /dev/sda1 rw\n\
            broken line\n";
        let lines: Vec<_> = parse(text).collect();
        let expected = [
            ("0:21", "/proc", "proc", "proc"),
            ("0:52", "/a b/m/7", "fuse.skimmer", "skimmer x"),
            ("8:1", "/odd\\9\\", "ext4", "/dev/sda1"),
        ]
        .map(|(device, mount_point, file_system, source)| Line {
            device: device.to_owned(),
            mount_point: PathBuf::from(mount_point),
            file_system: file_system.to_owned(),
            source: PathBuf::from(source),
        });
        assert_eq!(lines, expected);
    }
}
