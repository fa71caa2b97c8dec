//! The frames on a stream, byte by byte. Pure.
//!
//! A stream is opened by the asking end and lives as long as its connection. Integers are
//! little-endian. Every frame: kind (1), zeros (3), id (4), payload length (4), payload.
//!
//! Asking end → serving end:
//! ```text
//!  1 hello   version u32 = 1, role u8 (0 bulk, 1 faults), zeros (3); id 0; the first frame, once
//!  2 ask     class u8 (0 fault, 1 pull-through, 2 background), zeros (3), blob length u64,
//!            blob SHA-256 (32), scope length u16, runs u16, scope, runs × (first piece u32, pieces u32)
//!  3 credit  bytes u32: the reader of request `id` took so many; more may be under way
//!  4 cancel  nothing; request `id` isn't wanted any more
//!  5 call    which u8, then: 1 haves: task id (32), haves
//!                            2 get: kind u8 (0 table, 1 index, 2 document), blob (32), object (32), scope
//!                            3 grant: an encoded grant
//! ```
//! Serving end → asking end, `id` being the request's:
//! ```text
//! 17 piece   piece u32, length of the statement u32, statement, bytes of the piece
//! 18 absent  piece u32
//! 19 end     nothing; the reply to a call is whole
//! 20 refused reason u8, detail (UTF-8, at most 512); the request or call is over
//! 21 part    bytes of the reply to a call: haves, an object, or nothing
//! ```
//! Ids are the asking end's; it doesn't use one again on a stream. A bitmap has one bit a piece, lowest
//! first, in 64-bit words, without zero words at the end. A request begins with the credit of
//! [`Request::window`](super::Request); a piece may be sent when its whole length is covered.

use skimmer_cache::Class;
use skimmer_identity::statement::MAX_SIGNED_VALUE;
use skimmer_proto::{Digest, PieceSet, Scope, TaskId};

use super::{Call, Haves, Kind, MAX_GRANT, MAX_RUNS, Reason, Refusal, Reply, Request};

pub const HEADER: usize = 12;
const VERSION: u32 = 1;

/// Bytes of a reply in one frame.
pub const MAX_PART: usize = 256 << 10;
const MAX_DETAIL: usize = 512;
const MAX_SCOPE: usize = 512;
const MAX_BITMAP: usize = 128 << 10;
const MAX_HAVES: usize = 4 + 2 * MAX_BITMAP;
const MAX_PIECE: usize = 4 << 20;
const MAX_ASK: usize = 48 + MAX_SCOPE + 8 * MAX_RUNS;
const MAX_CALL: usize = 33 + MAX_HAVES;

/// Bytes of a piece frame's payload before the statement.
pub const PIECE_PREFIX: usize = 8;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Bulk,
    /// Reserved for what a reader waits for.
    Faults,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Hello,
    Ask,
    Credit,
    Cancel,
    Call,
    Piece,
    Absent,
    End,
    Refused,
    Part,
}

/// Number, meaning, shortest and longest payload.
const KINDS: [(u8, What, usize, usize); 10] = [
    (1, What::Hello, 8, 8),
    (2, What::Ask, 48 + 8, MAX_ASK),
    (3, What::Credit, 4, 4),
    (4, What::Cancel, 0, 0),
    (5, What::Call, 1, MAX_CALL),
    (17, What::Piece, PIECE_PREFIX + 1, PIECE_PREFIX + MAX_SIGNED_VALUE + MAX_PIECE),
    (18, What::Absent, 4, 4),
    (19, What::End, 0, 0),
    (20, What::Refused, 1, 1 + MAX_DETAIL),
    (21, What::Part, 0, MAX_PART),
];

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    #[error("a frame of kind {kind} with a payload of {len} bytes")]
    Length { kind: u8, len: usize },
    #[error("a frame of kind {0} doesn't make sense")]
    Payload(u8),
    #[error("a stream that doesn't begin with hello, or says it twice")]
    Hello,
    #[error("it speaks version {0} of the protocol, this node {VERSION}")]
    Version(u32),
    #[error("a frame that only the other end may send")]
    Direction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub what: What,
    pub id: u32,
    /// Of the payload.
    pub len: usize,
}

impl Header {
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, Error> {
        let [kind, z0, z1, z2, id @ .., l0, l1, l2, l3] = *bytes;
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let len = usize::try_from(len).map_err(|_| Error::Payload(kind))?;
        let known = KINDS.into_iter().find(|(number, ..)| *number == kind);
        let (_, what, least, most) = known.ok_or(Error::Kind(kind))?;
        if !(least..=most).contains(&len) {
            return Err(Error::Length { kind, len });
        }
        if [z0, z1, z2] != [0; 3] {
            return Err(Error::Payload(kind));
        }
        Ok(Self { what, id: u32::from_le_bytes(id), len })
    }

    pub fn encode(self) -> [u8; HEADER] {
        let kind = KINDS.iter().find(|(_, what, ..)| *what == self.what).map_or(0, |kind| kind.0);
        // No payload comes near 4 GiB.
        let len = u32::try_from(self.len).unwrap_or(u32::MAX);
        let mut bytes = [0; HEADER];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8..].copy_from_slice(&len.to_le_bytes());
        bytes
    }
}

/// A frame of the asking end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    Hello(Role),
    Ask { id: u32, request: Request },
    Credit { id: u32, bytes: u32 },
    Cancel { id: u32 },
    Call { id: u32, call: Call },
}

impl Asked {
    pub fn encode(&self) -> Vec<u8> {
        let (what, id, payload) = match self {
            Self::Hello(role) => {
                let role = u32::from(*role == Role::Faults);
                (What::Hello, 0, [VERSION.to_le_bytes(), role.to_le_bytes()].concat())
            }
            Self::Ask { id, request } => (What::Ask, *id, encode_request(request)),
            Self::Credit { id, bytes } => (What::Credit, *id, bytes.to_le_bytes().to_vec()),
            Self::Cancel { id } => (What::Cancel, *id, Vec::new()),
            Self::Call { id, call } => (What::Call, *id, encode_call(call)),
        };
        frame(what, id, &payload)
    }

    pub fn decode(header: Header, payload: &[u8]) -> Result<Self, Error> {
        let Header { what, id, .. } = header;
        let senseless = Error::Payload(header.encode()[0]);
        match what {
            What::Hello => {
                let (version, role) = split_u32(payload).ok_or(senseless)?;
                match (version, role) {
                    (VERSION, [0, 0, 0, 0]) => Ok(Self::Hello(Role::Bulk)),
                    (VERSION, [1, 0, 0, 0]) => Ok(Self::Hello(Role::Faults)),
                    (VERSION, _) => Err(Error::Payload(1)),
                    (other, _) => Err(Error::Version(other)),
                }
            }
            What::Ask => {
                decode_request(payload).map(|request| Self::Ask { id, request }).ok_or(senseless)
            }
            What::Credit => {
                let (bytes, _) = split_u32(payload).ok_or(senseless)?;
                Ok(Self::Credit { id, bytes })
            }
            What::Cancel => Ok(Self::Cancel { id }),
            What::Call => decode_call(payload).map(|call| Self::Call { id, call }).ok_or(senseless),
            _ => Err(Error::Direction),
        }
    }
}

/// A whole frame.
pub fn frame(what: What, id: u32, payload: &[u8]) -> Vec<u8> {
    [&Header { what, id, len: payload.len() }.encode()[..], payload].concat()
}

pub fn refused(id: u32, refusal: &Refusal) -> Vec<u8> {
    let reason = Reason::ALL.iter().position(|reason| *reason == refusal.reason).unwrap_or(0);
    let mut payload = vec![u8::try_from(reason).unwrap_or(0)];
    let mut end = refusal.detail.len().min(MAX_DETAIL);
    while !refusal.detail.is_char_boundary(end) {
        end -= 1;
    }
    payload.extend_from_slice(&refusal.detail.as_bytes()[..end]);
    frame(What::Refused, id, &payload)
}

pub fn decode_refused(payload: &[u8]) -> Result<Refusal, Error> {
    let (reason, detail) = payload.split_first().ok_or(Error::Payload(20))?;
    let reason = Reason::ALL.get(usize::from(*reason)).ok_or(Error::Payload(20))?;
    // It ends up in logs: one line, printable.
    let detail = String::from_utf8_lossy(detail).replace(char::is_control, " ");
    Ok(Refusal { reason: *reason, detail })
}

/// What the parts of a reply add up to.
pub fn encode_reply(reply: &Reply) -> Vec<u8> {
    match reply {
        Reply::Haves(haves) => encode_haves(haves),
        Reply::Object(bytes) => bytes.to_vec(),
        Reply::Done => Vec::new(),
    }
}

pub fn decode_reply(call: &Call, bytes: Vec<u8>) -> Option<Reply> {
    match call {
        Call::Haves { .. } => decode_haves(&bytes).map(Reply::Haves),
        Call::Get { .. } => Some(Reply::Object(bytes.into())),
        Call::ShowGrant(_) => bytes.is_empty().then_some(Reply::Done),
    }
}

/// The most bytes that the reply to a call can have.
pub const fn reply_bound(call: &Call) -> usize {
    match call {
        Call::Haves { .. } => MAX_HAVES,
        Call::Get { .. } => super::MAX_OBJECT,
        Call::ShowGrant(_) => 0,
    }
}

fn encode_request(request: &Request) -> Vec<u8> {
    let scope = request.scope.name().as_bytes();
    let mut out = vec![class_number(request.class), 0, 0, 0];
    out.extend_from_slice(&request.len.to_le_bytes());
    out.extend_from_slice(request.blob.as_bytes());
    // Both are bounded by `Request::check` and `Asked::fits`.
    out.extend_from_slice(&u16::try_from(scope.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(&u16::try_from(request.pieces.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(scope);
    for run in &request.pieces {
        out.extend_from_slice(&run.start.to_le_bytes());
        out.extend_from_slice(&run.end.saturating_sub(run.start).to_le_bytes());
    }
    out
}

fn decode_request(payload: &[u8]) -> Option<Request> {
    let ([class, 0, 0, 0], rest) = payload.split_first_chunk()? else { return None };
    let (len, rest) = rest.split_first_chunk()?;
    let (blob, rest) = rest.split_first_chunk::<32>()?;
    let (scope_len, rest) = rest.split_first_chunk()?;
    let (runs, rest) = rest.split_first_chunk()?;
    let (scope, rest) = rest.split_at_checked(u16::from_le_bytes(*scope_len).into())?;
    let (pairs, []) = rest.as_chunks::<8>() else { return None };
    if pairs.len() != usize::from(u16::from_le_bytes(*runs)) {
        return None;
    }
    let pieces = pairs.iter().map(|pair| {
        let (start, count) = split_u32(pair)?;
        Some(start..start.checked_add(u32::from_le_bytes(count.try_into().ok()?))?)
    });
    let request = Request {
        scope: decode_scope(scope)?,
        blob: Digest::from_bytes(*blob),
        len: u64::from_le_bytes(*len),
        pieces: pieces.collect::<Option<_>>()?,
        class: *Class::ALL.get(usize::from(*class))?,
    };
    request.check().is_ok().then_some(request)
}

fn encode_call(call: &Call) -> Vec<u8> {
    match call {
        Call::Haves { task, haves } => [&[1], &task.as_bytes()[..], &encode_haves(haves)].concat(),
        Call::Get { scope, blob, kind, object } => {
            let head = [2, *kind as u8];
            [&head, &blob.as_bytes()[..], object.as_bytes(), scope.name().as_bytes()].concat()
        }
        Call::ShowGrant(grant) => [&[3], &grant[..]].concat(),
    }
}

fn decode_call(payload: &[u8]) -> Option<Call> {
    let (which, rest) = payload.split_first()?;
    match which {
        1 => {
            let (task, haves) = rest.split_first_chunk()?;
            Some(Call::Haves { task: TaskId::from_bytes(*task), haves: decode_haves(haves)? })
        }
        2 => {
            let (kind, rest) = rest.split_first()?;
            let kind =
                [Kind::PieceTable, Kind::LayerIndex, Kind::Document].get(usize::from(*kind))?;
            let (blob, rest) = rest.split_first_chunk()?;
            let (object, scope) = rest.split_first_chunk()?;
            let (blob, object) = (Digest::from_bytes(*blob), Digest::from_bytes(*object));
            Some(Call::Get { scope: decode_scope(scope)?, blob, kind: *kind, object })
        }
        3 if rest.len() <= MAX_GRANT => Some(Call::ShowGrant(rest.to_vec().into())),
        _ => None,
    }
}

fn decode_scope(name: &[u8]) -> Option<Scope> {
    let name = std::str::from_utf8(name).ok()?;
    (name.len() <= MAX_SCOPE).then(|| Scope::from_name(name))
}

/// Whether a call or a request can be put in a frame at all.
pub fn fits(asked: &Asked) -> bool {
    let scope = match asked {
        Asked::Ask { request, .. } => &request.scope,
        Asked::Call { call: Call::Get { scope, .. }, .. } => scope,
        Asked::Call { call: Call::ShowGrant(grant), .. } => return grant.len() <= MAX_GRANT,
        _ => return true,
    };
    scope.name().len() <= MAX_SCOPE
}

/// Two bitmaps, the first one's length in front of both.
fn encode_haves(haves: &Haves) -> Vec<u8> {
    let pieces = encode_bitmap(&haves.pieces);
    let len = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
    [&len.to_le_bytes()[..], &pieces, &encode_bitmap(&haves.coming)].concat()
}

fn decode_haves(bytes: &[u8]) -> Option<Haves> {
    let (len, bitmaps) = split_u32(bytes)?;
    let (pieces, coming) = bitmaps.split_at_checked(len as usize)?;
    Some(Haves { pieces: decode_bitmap(pieces)?, coming: decode_bitmap(coming)? })
}

fn encode_bitmap(pieces: &PieceSet) -> Vec<u8> {
    (0..pieces.words()).flat_map(|word| pieces.word(word).to_le_bytes()).collect()
}

fn decode_bitmap(bytes: &[u8]) -> Option<PieceSet> {
    let (words, []) = bytes.as_chunks::<8>() else { return None };
    if bytes.len() > MAX_BITMAP || words.last() == Some(&[0; 8]) {
        return None;
    }
    let mut pieces = PieceSet::new();
    for (base, word) in (0_u32..).step_by(64).zip(words) {
        let mut rest = u64::from_le_bytes(*word);
        while rest != 0 {
            pieces.insert(base + rest.trailing_zeros());
            rest &= rest - 1;
        }
    }
    Some(pieces)
}

const fn class_number(class: Class) -> u8 {
    match class {
        Class::Fault => 0,
        Class::PullThrough => 1,
        Class::Background => 2,
    }
}

/// The first four bytes as a number, and the rest.
pub fn split_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*number), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert, proptest};

    fn rows() -> Vec<Asked> {
        let (blob, object) = (Digest::of(b"blob"), Digest::of(b"object"));
        let scope = Scope::Repository("registry:5000/a/b".to_owned());
        let task = TaskId::of(&scope, &blob);
        let request = Request {
            scope: scope.clone(),
            blob,
            len: 40 << 20,
            pieces: vec![7..9, 0..1, 100..160],
            class: Class::Background,
        };
        let kinds = [Kind::PieceTable, Kind::LayerIndex, Kind::Document];
        let mut rows = vec![
            Asked::Hello(Role::Bulk),
            Asked::Hello(Role::Faults),
            Asked::Ask { id: 1, request: Request { scope: Scope::Public, ..request.clone() } },
            Asked::Ask { id: u32::MAX, request },
            Asked::Credit { id: 9, bytes: u32::MAX },
            Asked::Cancel { id: 3 },
            Asked::Call { id: 4, call: Call::ShowGrant(vec![1, 2, 3].into()) },
        ];
        for pieces in
            [PieceSet::new(), PieceSet::all(1), PieceSet::all(64), [3, 5000].into_iter().collect()]
        {
            let haves = Haves { pieces: PieceSet::all(3), coming: pieces.clone() };
            rows.push(Asked::Call { id: 5, call: Call::Haves { task, haves } });
            let haves = Haves { pieces, coming: PieceSet::new() };
            rows.push(Asked::Call { id: 5, call: Call::Haves { task, haves } });
        }
        for kind in kinds {
            let scope = scope.clone();
            rows.push(Asked::Call { id: 6, call: Call::Get { scope, blob, kind, object } });
        }
        rows
    }

    fn decode(bytes: &[u8]) -> Result<Asked, Error> {
        let (header, payload) = bytes.split_first_chunk().unwrap();
        let header = Header::decode(header)?;
        assert_eq!(header.len, payload.len());
        Asked::decode(header, payload)
    }

    #[test]
    fn frames_return() {
        for asked in rows() {
            assert!(fits(&asked));
            assert_eq!(decode(&asked.encode()), Ok(asked));
        }
    }

    #[test]
    fn senseless_frames_are_refused() {
        let of = |kind: u8, payload: &[u8]| {
            let mut bytes = vec![kind, 0, 0, 0, 0, 0, 0, 0];
            bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(payload);
            bytes
        };
        for (bytes, expected) in [
            (of(0, &[]), Error::Kind(0)),
            (of(16, &[]), Error::Kind(16)),
            (of(1, &[2, 0, 0, 0, 0, 0, 0, 0]), Error::Version(2)),
            (of(1, &[1, 0, 0, 0, 2, 0, 0, 0]), Error::Payload(1)),
            (of(1, &[]), Error::Length { kind: 1, len: 0 }),
            (of(2, &[0; 60]), Error::Payload(2)),
            (of(3, &[0; 5]), Error::Length { kind: 3, len: 5 }),
            (of(5, &[9]), Error::Payload(5)),
            (of(5, &[[1; 33].as_slice(), &[0; 8]].concat()), Error::Payload(5)),
            (of(5, &[3; 1026]), Error::Payload(5)),
            (of(18, &[0; 4]), Error::Direction),
        ] {
            assert_eq!(decode(&bytes), Err(expected), "{bytes:?}");
        }
        let huge = [17, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(Header::decode(&huge), Err(Error::Length { kind: 17, .. })));
    }

    #[test]
    fn refusals_return_and_are_cut() {
        for reason in Reason::ALL {
            let long = Refusal::new(reason, "ü".repeat(400));
            let bytes = refused(7, &long);
            let (header, payload) = bytes.split_first_chunk().unwrap();
            assert_eq!(Header::decode(header).unwrap().id, 7);
            assert_eq!(decode_refused(payload), Ok(Refusal::new(reason, "ü".repeat(256))));
        }
        assert_eq!(decode_refused(b"\x00a\nb"), Ok(Refusal::new(Reason::Rights, "a b")));
        assert_eq!(decode_refused(&[5]), Err(Error::Payload(20)));
    }

    proptest! {
        #[test]
        fn arbitrary_frames_never_panic(kind in 0..24u8, payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = vec![kind, 0, 0, 0, 1, 0, 0, 0];
            bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(&payload);
            if let Ok(asked) = decode(&bytes) {
                // Only hello ignores its id.
                prop_assert!(matches!(asked, Asked::Hello(_)) || asked.encode() == bytes);
            }
            let _ = decode_refused(&payload);
        }

        #[test]
        fn a_changed_byte_never_panics(row in 0..14usize, at in any::<proptest::sample::Index>(), flip in 1..=255u8) {
            let rows = rows();
            let asked = &rows[row % rows.len()];
            let mut bytes = asked.encode();
            let at = HEADER + at.index(bytes.len());
            if at < bytes.len() {
                bytes[at] ^= flip;
                prop_assert!(decode(&bytes).as_ref() != Ok(asked));
            }
        }
    }
}
