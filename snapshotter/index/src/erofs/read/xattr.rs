//! The extended attributes of an inode.

use crate::erofs::format::{self, XATTR_ENTRY_LEN};

/// One attribute; its name is in two parts because the image keeps well-known prefixes as numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xattr<'a> {
    pub prefix: &'static [u8],
    pub suffix: &'a [u8],
    pub value: &'a [u8],
}

impl Xattr<'_> {
    /// The full name.
    pub fn name(&self) -> Vec<u8> {
        [self.prefix, self.suffix].concat()
    }

    /// Whether this is the attribute of that full name.
    pub fn is(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix) == Some(self.suffix)
    }

    /// The bytes of the full name.
    pub(super) fn name_bytes(&self) -> impl Iterator<Item = &u8> {
        self.prefix.iter().chain(self.suffix)
    }
}

/// Attributes in the order of the image.
#[derive(Clone, Debug)]
pub struct Xattrs<'a> {
    rest: &'a [u8],
}

impl<'a> Xattrs<'a> {
    pub(super) fn new(entries: &'a [u8]) -> Self {
        Self { rest: entries }
    }

    /// What has not been parsed: nothing, once all entries were.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The entry at the front, checked.
    fn parse(&self) -> Option<(Xattr<'a>, &'a [u8])> {
        let [name_len, index, ..] = *self.rest else { return None };
        let value_len = usize::from(format::u16_at(self.rest, 2)?);
        let (_, prefix) = format::XATTR_PREFIXES.into_iter().find(|(i, _)| *i == index)?;
        let name_end = XATTR_ENTRY_LEN + usize::from(name_len);
        let suffix = self.rest.get(XATTR_ENTRY_LEN..name_end)?;
        let value_end = name_end + value_len;
        let value = self.rest.get(name_end..value_end)?;
        let end = value_end.next_multiple_of(XATTR_ENTRY_LEN);
        let padding = self.rest.get(value_end..end)?;
        let whole = format::is_whole_name(index) == suffix.is_empty();
        if !whole || suffix.contains(&0) || padding.iter().any(|b| *b != 0) {
            return None;
        }
        Some((Xattr { prefix, suffix, value }, self.rest.get(end..)?))
    }
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Xattr<'a>;

    /// Ends at the first entry that is not valid.
    fn next(&mut self) -> Option<Self::Item> {
        let (xattr, rest) = self.parse()?;
        self.rest = rest;
        Some(xattr)
    }
}
