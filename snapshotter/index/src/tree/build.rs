//! Entries in the order of the archive, folded into a tree.

use std::collections::{BTreeMap, HashMap};

use super::{Content, Error, Inode, InodeId, Tree};
use crate::tar::{Entry, Kind, Limits, display_path};

const MAX_NAME: usize = 255;
const MAX_TARGET: usize = 4095;
const MAX_FOLLOWED: usize = 255;
/// What an inode and a name take beside their bytes, roughly.
const INODE_COST: u64 = 256;
const NAME_COST: u64 = 64;

/// Takes entries in order, then [`finish`](TreeBuilder::finish)es the tree.
#[derive(Debug)]
pub struct TreeBuilder {
    limits: Limits,
    inodes: Vec<Inode>,
    /// Hard links whose target has not been seen; their inodes are placeholders.
    pending: BTreeMap<InodeId, Link>,
    /// Where the last entry is: the next one is mostly beside it.
    last: Option<(Vec<u8>, InodeId)>,
    /// Estimated memory.
    bytes: u64,
}

#[derive(Debug)]
struct Link {
    path: Vec<u8>,
    target: Vec<u8>,
}

impl TreeBuilder {
    /// A tree with a root that no entry describes yet.
    pub fn new(limits: Limits) -> Self {
        let (inodes, pending) = (vec![implicit_dir()], BTreeMap::new());
        Self { limits, inodes, pending, last: None, bytes: INODE_COST }
    }

    /// Takes the next entry.
    ///
    /// # Errors
    /// When the entry can't be placed, or [`Limits::metadata_bytes`] is used up.
    pub fn insert(&mut self, entry: Entry) -> Result<(), Error> {
        if entry.path.is_empty() {
            // Only a directory can stand for the root; containerd passes over the rest.
            if entry.kind == Kind::Dir {
                return self.update_dir(ROOT, &entry);
            }
            return Ok(());
        }
        let (parent, name) = split(&entry.path);
        let opaque_mark = name == b".wh..wh..opq";
        let mut parts = entry.path.split(|b| *b == b'/');
        if !opaque_mark && parts.any(|part| part.starts_with(b".wh..wh.")) {
            // Leftovers of AUFS.
            return Ok(());
        }
        if name.len() > MAX_NAME {
            let path = display_path(&entry.path);
            return Err(Error::NameTooLong { path, len: name.len() });
        }
        if entry.path.split(|b| *b == b'/').any(|part| matches!(part, b"" | b"." | b"..")) {
            return Err(Error::Path { path: display_path(&entry.path) });
        }
        if entry.path.contains(&0) {
            return Err(Error::Nul { path: display_path(&entry.path) });
        }
        let dir = match &self.last {
            Some((path, dir)) if path == parent => *dir,
            _ => {
                let dir = self.make_dirs(parent, &entry.path)?;
                self.last = Some((parent.to_vec(), dir));
                dir
            }
        };
        if opaque_mark {
            self.set_opaque(dir);
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(dir, hidden, &entry);
        }
        self.place(dir, name, &entry)
    }

    /// Resolves hard links to later entries and counts links.
    ///
    /// # Errors
    /// When a hard link's target is missing or a directory.
    pub fn finish(mut self) -> Result<Tree, Error> {
        let targets = self.resolve_links()?;
        let mut links = vec![0_u32; self.inodes.len()];
        let mut todo = vec![ROOT];
        while let Some(dir) = todo.pop() {
            let mut subdirs = 0_u32;
            // Taken out so that the children can be looked at.
            let mut children = match &mut self.inodes[dir.index()].content {
                Content::Dir { children, .. } => std::mem::take(children),
                _ => continue,
            };
            for child in children.values_mut() {
                *child = targets.get(child).copied().unwrap_or(*child);
                if self.inodes[child.index()].is_dir() {
                    subdirs += 1;
                    todo.push(*child);
                } else {
                    links[child.index()] += 1;
                }
            }
            links[dir.index()] = subdirs.saturating_add(2);
            if let Content::Dir { children: slot, .. } = &mut self.inodes[dir.index()].content {
                *slot = children;
            }
        }
        for (inode, links) in self.inodes.iter_mut().zip(links) {
            inode.links = links;
            if matches!(inode.content, Content::Dir { opaque: true, .. }) {
                inode.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
            }
        }
        Ok(Tree { inodes: self.inodes })
    }

    fn place(&mut self, dir: InodeId, name: &[u8], entry: &Entry) -> Result<(), Error> {
        let path = || display_path(&entry.path);
        let old = self.child(dir, name);
        let content = match &entry.kind {
            Kind::Dir => match old {
                Some(old) if self.inodes[old.index()].is_dir() => {
                    return self.update_dir(old, entry);
                }
                // The layer removes the lower file or directory and adds its own directory.
                Some(old) if self.inodes[old.index()].content == Content::Whiteout => {
                    Content::Dir { children: BTreeMap::new(), opaque: true }
                }
                _ => Content::Dir { children: BTreeMap::new(), opaque: false },
            },
            Kind::HardLink { target } => {
                let linked = self.link(target, entry)?;
                return self.name(dir, name, linked, entry);
            }
            Kind::Symlink { target } if target.is_empty() || target.len() > MAX_TARGET => {
                return Err(Error::SymlinkTarget { path: path(), len: target.len() });
            }
            Kind::Symlink { target } if target.contains(&0) => {
                return Err(Error::Nul { path: path() });
            }
            Kind::Symlink { target } => Content::Symlink { target: target.clone() },
            Kind::File => Content::File { size: entry.size, data: entry.data.clone() },
            Kind::CharDevice { major, minor } => {
                Content::CharDevice { major: *major, minor: *minor }
            }
            Kind::BlockDevice { major, minor } => {
                Content::BlockDevice { major: *major, minor: *minor }
            }
            Kind::Fifo => Content::Fifo,
        };
        let new = self.add(content, entry)?;
        self.name(dir, name, new, entry)
    }

    /// The inode that a hard link names: an earlier one, or a placeholder.
    fn link(&mut self, target: &[u8], entry: &Entry) -> Result<InodeId, Error> {
        match self.find(target, &entry.path)? {
            Some(found) if self.inodes[found.index()].is_dir() => Err(Error::LinkToDirectory {
                path: display_path(&entry.path),
                target: display_path(target),
            }),
            Some(found) => Ok(found),
            None => {
                let id = self.add(Content::Fifo, entry)?;
                let link = Link { path: entry.path.clone(), target: target.to_vec() };
                self.pending.insert(id, link);
                Ok(id)
            }
        }
    }

    /// What the whiteout of `hidden` in `dir` leaves: nothing of its own layer is removed by it.
    fn whiteout(&mut self, dir: InodeId, hidden: &[u8], entry: &Entry) -> Result<(), Error> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Error::Whiteout { path: display_path(&entry.path) });
        }
        match self.child(dir, hidden) {
            Some(own) => self.set_opaque(own),
            None => {
                let new = self.add(Content::Whiteout, entry)?;
                self.inodes[new.index()].mode = 0;
                self.name(dir, hidden, new, entry)?;
            }
        }
        Ok(())
    }

    /// Hard links to later entries: the inode that each placeholder stands for.
    fn resolve_links(&mut self) -> Result<HashMap<InodeId, InodeId>, Error> {
        let pending = std::mem::take(&mut self.pending);
        let mut targets: HashMap<InodeId, InodeId> = HashMap::new();
        for (first, link) in self.still_named(&pending) {
            let missing = || Error::MissingTarget {
                path: display_path(&link.path),
                target: display_path(&link.target),
            };
            // A link may name a link. Each is followed once.
            let mut chain = Vec::new();
            let mut at = first;
            let end = loop {
                if let Some(end) = targets.get(&at) {
                    break *end;
                }
                let Some(next) = pending.get(&at) else { break at };
                if chain.len() > pending.len() || chain.last() == Some(&at) {
                    return Err(missing());
                }
                chain.push(at);
                at = self.find(&next.target, &next.path)?.ok_or_else(missing)?;
            };
            if self.inodes[end.index()].is_dir() {
                return Err(Error::LinkToDirectory {
                    path: display_path(&link.path),
                    target: display_path(&link.target),
                });
            }
            targets.extend(chain.into_iter().map(|link| (link, end)));
        }
        Ok(targets)
    }

    /// The placeholders that later entries did not replace.
    fn still_named<'a>(&self, pending: &'a BTreeMap<InodeId, Link>) -> Vec<(InodeId, &'a Link)> {
        let mut out = Vec::new();
        let mut todo = if pending.is_empty() { Vec::new() } else { vec![ROOT] };
        while let Some(id) = todo.pop() {
            match self.inodes[id.index()].children() {
                Some(children) => todo.extend(children.values()),
                None => out.extend(pending.get(&id).map(|link| (id, link))),
            }
        }
        out
    }

    /// Adds an inode that has no name yet.
    fn add(&mut self, content: Content, entry: &Entry) -> Result<InodeId, Error> {
        let bulk = match &content {
            Content::File { data, .. } => size_of_val(data.as_slice()),
            Content::Symlink { target } => target.len(),
            _ => 0,
        };
        let xattrs = xattrs_of(entry, &content);
        let names: usize = xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        let cost = INODE_COST + (bulk + names) as u64 + NAME_COST * xattrs.len() as u64;
        self.charge(cost, &entry.path)?;
        let inode = Inode {
            content,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs,
            links: 0,
            implicit: false,
        };
        self.push(inode, &entry.path)
    }

    fn push(&mut self, inode: Inode, path: &[u8]) -> Result<InodeId, Error> {
        let limit = self.limits.metadata_bytes;
        let id = u32::try_from(self.inodes.len());
        let id = id.map_err(|_| Error::TooLarge { path: display_path(path), limit })?;
        self.inodes.push(inode);
        Ok(InodeId(id))
    }

    /// Gives an inode a name, in place of whatever had it.
    fn name(&mut self, dir: InodeId, name: &[u8], id: InodeId, entry: &Entry) -> Result<(), Error> {
        self.charge(NAME_COST + name.len() as u64, &entry.path)?;
        if let Content::Dir { children, .. } = &mut self.inodes[dir.index()].content {
            // What is replaced may have led to the last directory.
            if children.insert(name.to_vec(), id).is_some() {
                self.last = None;
            }
        }
        Ok(())
    }

    fn update_dir(&mut self, dir: InodeId, entry: &Entry) -> Result<(), Error> {
        let names = entry.xattrs.iter().map(|(name, value)| name.len() + value.len());
        self.charge(names.map(|len| len as u64 + NAME_COST).sum(), &entry.path)?;
        let inode = &mut self.inodes[dir.index()];
        inode.mode = entry.mode;
        inode.uid = entry.uid;
        inode.gid = entry.gid;
        inode.mtime = entry.mtime;
        inode.xattrs = xattrs_of(entry, &inode.content);
        inode.implicit = false;
        Ok(())
    }

    fn set_opaque(&mut self, id: InodeId) {
        if let Content::Dir { opaque, .. } = &mut self.inodes[id.index()].content {
            *opaque = true;
        }
    }

    fn child(&self, dir: InodeId, name: &[u8]) -> Option<InodeId> {
        self.inodes[dir.index()].children()?.get(name).copied()
    }

    fn charge(&mut self, bytes: u64, path: &[u8]) -> Result<(), Error> {
        self.bytes = self.bytes.saturating_add(bytes);
        let limit = self.limits.metadata_bytes;
        if self.bytes > limit {
            return Err(Error::TooLarge { path: display_path(path), limit });
        }
        Ok(())
    }

    /// The directory at `dirs`, made where it is missing. `path` is what all this is for.
    fn make_dirs(&mut self, dirs: &[u8], path: &[u8]) -> Result<InodeId, Error> {
        let mut walk = Walk::new(dirs);
        while let Some(name) = walk.next_name() {
            let dir = walk.dir();
            let Some(child) = self.child(dir, &name) else {
                if name.len() > MAX_NAME {
                    return Err(Error::NameTooLong { path: display_path(path), len: name.len() });
                }
                self.charge(INODE_COST + NAME_COST + name.len() as u64, path)?;
                let new = self.push(implicit_dir(), path)?;
                if let Content::Dir { children, .. } = &mut self.inodes[dir.index()].content {
                    children.insert(name, new);
                }
                walk.enter(new, path, &self.limits)?;
                continue;
            };
            match &self.inodes[child.index()].content {
                Content::Dir { .. } => walk.enter(child, path, &self.limits)?,
                Content::Symlink { target } => walk.follow(target, path)?,
                Content::Whiteout => {
                    // The layer removes something and then puts a directory in its place.
                    let mut inode = implicit_dir();
                    inode.content = Content::Dir { children: BTreeMap::new(), opaque: true };
                    self.inodes[child.index()] = inode;
                    walk.enter(child, path, &self.limits)?;
                }
                _ => {
                    let (path, parent) = (display_path(path), display_path(&name));
                    return Err(Error::NotADirectory { path, parent });
                }
            }
        }
        Ok(walk.dir())
    }

    /// The inode at `target`, symbolic links followed in all but the last name.
    fn find(&self, target: &[u8], path: &[u8]) -> Result<Option<InodeId>, Error> {
        let (dirs, name) = split(target);
        let mut walk = Walk::new(dirs);
        while let Some(part) = walk.next_name() {
            let Some(child) = self.child(walk.dir(), &part) else { return Ok(None) };
            match &self.inodes[child.index()].content {
                Content::Dir { .. } => walk.enter(child, path, &self.limits)?,
                Content::Symlink { target } => walk.follow(target, path)?,
                _ => return Ok(None),
            }
        }
        if name.is_empty() {
            return Ok(Some(ROOT));
        }
        Ok(self.child(walk.dir(), name))
    }
}

const ROOT: InodeId = InodeId(0);

/// A walk along a path that stays below the root.
struct Walk {
    /// Directories from the root to where the walk stands.
    dirs: Vec<InodeId>,
    /// Names still to go, the next one last.
    names: Vec<Vec<u8>>,
    followed: usize,
}

impl Walk {
    fn new(path: &[u8]) -> Self {
        let mut walk = Self { dirs: Vec::new(), names: Vec::new(), followed: 0 };
        walk.ahead(path);
        walk
    }

    fn dir(&self) -> InodeId {
        self.dirs.last().copied().unwrap_or(ROOT)
    }

    fn next_name(&mut self) -> Option<Vec<u8>> {
        loop {
            let name = self.names.pop()?;
            match name.as_slice() {
                b"" | b"." => {}
                b".." => drop(self.dirs.pop()),
                _ => return Some(name),
            }
        }
    }

    fn enter(&mut self, dir: InodeId, path: &[u8], limits: &Limits) -> Result<(), Error> {
        self.dirs.push(dir);
        if self.dirs.len() > limits.depth {
            return Err(Error::TooDeep { path: display_path(path), limit: limits.depth });
        }
        Ok(())
    }

    fn follow(&mut self, target: &[u8], path: &[u8]) -> Result<(), Error> {
        self.followed += 1;
        if self.followed > MAX_FOLLOWED {
            return Err(Error::SymlinkLoop { path: display_path(path) });
        }
        if target.starts_with(b"/") {
            self.dirs.clear();
        }
        self.ahead(target);
        Ok(())
    }

    fn ahead(&mut self, path: &[u8]) {
        self.names.extend(path.split(|b| *b == b'/').rev().map(<[u8]>::to_vec));
    }
}

/// A parent that no entry describes, as containerd makes it.
fn implicit_dir() -> Inode {
    Inode {
        content: Content::Dir { children: BTreeMap::new(), opaque: false },
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        xattrs: BTreeMap::new(),
        links: 0,
        implicit: true,
    }
}

/// The attributes that Linux would keep on such an inode: unpacking passes over the others too.
fn xattrs_of(entry: &Entry, content: &Content) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let is_dir = matches!(content, Content::Dir { .. });
    let is_file = matches!(content, Content::File { .. });
    let is_symlink = matches!(content, Content::Symlink { .. });
    let below =
        |name: &[u8], prefix: &[u8]| name.strip_prefix(prefix).is_some_and(|n| !n.is_empty());
    let kept = |name: &[u8]| match name {
        b"system.posix_acl_access" => !is_symlink,
        b"system.posix_acl_default" => is_dir,
        name if below(name, b"user.") => is_dir || is_file,
        name => below(name, b"trusted.") || below(name, b"security."),
    };
    if *content == Content::Whiteout {
        return BTreeMap::new();
    }
    entry.xattrs.iter().filter(|(name, _)| kept(name)).cloned().collect()
}

/// Directory and last name of a path.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}
