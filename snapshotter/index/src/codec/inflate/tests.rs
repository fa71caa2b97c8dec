//! Against flate2 (zlib-rs) as compressor and as decoder, and against streams made bit by bit.

use std::io::{Read, Write};

use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use flate2::{Compression, FlushCompress};
use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::{At, Error, Inflate, WINDOW_LEN};
use crate::codec::tests::data;

/// Decodes in steps of so many bytes in and out; what each step returned goes to `seen`.
fn decode(
    stream: &[u8],
    (step, room): (usize, usize),
    stop: bool,
    mut seen: impl FnMut(&mut Inflate, usize, usize, At),
) -> Result<(Vec<u8>, usize), Error> {
    let mut inflate = Inflate::new();
    let (mut out, mut at) = (Vec::new(), 0);
    let mut buffer = vec![0; room];
    loop {
        let input = &stream[at..stream.len().min(at + step)];
        let done = inflate.step(input, &mut buffer, stop)?;
        out.extend_from_slice(&buffer[..done.produced]);
        at += done.consumed;
        seen(&mut inflate, at, out.len(), done.at);
        if done.at == At::End {
            return Ok((out, at));
        }
        if done.consumed + done.produced == 0 && done.at == At::Middle {
            assert!(at == stream.len(), "stands still at {at} of {}", stream.len());
            return Err(Error::Data("truncated"));
        }
    }
}

fn all(stream: &[u8]) -> Result<Vec<u8>, Error> {
    decode(stream, (usize::MAX >> 1, 1 << 16), false, |_, _, _, _| ()).map(|(out, _)| out)
}

/// Decodes `len` bytes from bit `bit` on, with this window before them.
fn enter(stream: &[u8], bit: u64, window: &[u8; WINDOW_LEN], len: usize) -> Vec<u8> {
    let (at, bit) = ((bit / 8) as usize, (bit % 8) as u8);
    let mut inflate = Inflate::new();
    inflate.set_window(window);
    if bit > 0 {
        inflate.resume(8 - bit, stream[at] >> bit);
    }
    let mut input = &stream[at + usize::from(bit > 0)..];
    let (mut out, mut filled) = (vec![0; len + 1], 0);
    loop {
        let step = inflate.step(input, &mut out[filled..], false).unwrap();
        filled += step.produced;
        input = &input[step.consumed..];
        if step.at == At::End {
            out.truncate(filled);
            return out;
        }
        assert!(step.consumed + step.produced > 0);
    }
}

fn deflate(level: u32, bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes of few kinds, as codes of all lengths come of: those of the i-th kind half as often as those before.
fn skewed(seed: u64, len: usize) -> Vec<u8> {
    data(seed, len)
        .iter()
        .zip(data(!seed, len))
        .map(|(a, b)| (a ^ b).trailing_zeros().to_le_bytes()[0])
        .collect()
}

/// Numbers below what is asked for.
fn numbers(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed | 1;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (((state >> 32) * below as u64) >> 32) as usize
    }
}

/// Sixteen kinds, equally likely: nothing but literals of four bits.
fn nibbles(seed: u64, len: usize) -> Vec<u8> {
    let mut number = numbers(seed);
    (0..len).map(|_| b"abcdefghijklmnop"[number(16)]).collect()
}

fn contents() -> impl Strategy<Value = Vec<u8>> {
    let kinds: [fn(u64, usize) -> Vec<u8>; 3] = [data, skewed, nibbles];
    (0..3_usize, any::<u64>(), 0..400_000_usize)
        .prop_map(move |(kind, seed, len)| kinds[kind](seed, len))
}

fn cuts() -> impl Strategy<Value = (usize, usize)> {
    let some = || prop_oneof![1..40_usize, 40..5000_usize, 5000..300_000_usize];
    (some(), some())
}

proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_deflated_comes_back_however_it_is_cut(plain in contents(), level in 0..=9_u32, cut in cuts()) {
        let mut stream = deflate(level, &plain);
        let len = stream.len();
        stream.extend_from_slice(b"something else");
        let (out, read) = decode(&stream, cut, false, |_, _, _, _| ()).unwrap();
        prop_assert!(out == plain);
        prop_assert_eq!(read, len);
    }

    /// Blocks can be entered with their first bit and the window before them, of which nothing is superfluous.
    #[test]
    fn blocks_can_be_entered(plain in contents(), level in 1..=9_u32, cut in cuts(), flip: proptest::sample::Index) {
        let stream = deflate(level, &plain);
        let (mut entered, mut blocks) = (None, Vec::new());
        let (out, _) = decode(&stream, cut, true, |inflate, read, produced, at| {
            let last = entered.map_or(0, |(_, last)| last);
            let next = match at {
                At::Middle => return,
                At::Block { .. } if produced - last < WINDOW_LEN => return,
                At::Block { unused_bits } => Some((read as u64 * 8 - u64::from(unused_bits), produced)),
                At::End => None,
            };
            let window = inflate.take_window();
            assert_eq!(window.is_some(), entered.is_some());
            blocks.extend(entered.zip(window));
            inflate.set_checkpoint();
            entered = next;
        }).unwrap();
        prop_assert!(out == plain);
        for ((bit, start), mut window) in blocks {
            let before = plain[..start].iter().rev().chain(std::iter::repeat(&0));
            prop_assert!(window.iter().rev().zip(before).all(|(kept, byte)| *kept == 0 || kept == byte));
            prop_assert!(enter(&stream, bit, &window, plain.len() - start) == plain[start..]);
            let kept: Vec<usize> = (0..WINDOW_LEN).filter(|at| window[*at] != 0).collect();
            if !kept.is_empty() {
                window[kept[flip.index(kept.len())]] ^= 1;
                prop_assert!(enter(&stream, bit, &window, plain.len() - start) != plain[start..]);
            }
        }
    }

    /// The same bytes, and refused where zlib refuses, if not always as early.
    #[test]
    fn damaged_streams_are_taken_as_zlib_takes_them(
        plain in contents(),
        level in 0..=9_u32,
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), 0..8_u8), 1..4),
        near_start: bool,
        cut in cuts(),
    ) {
        let mut stream = deflate(level, &plain);
        for (at, bit) in flips {
            let bound = if near_start { stream.len().min(100) } else { stream.len() };
            stream[at.index(bound)] ^= 1 << bit;
        }
        let mut zlibs = Vec::new();
        let zlib = DeflateDecoder::new(&stream[..]).read_to_end(&mut zlibs);
        match decode(&stream, cut, false, |_, _, _, _| ()) {
            Ok((out, _)) => {
                prop_assert!(zlib.is_ok(), "zlib: {zlib:?}");
                prop_assert!(out == zlibs);
            }
            Err(error) => prop_assert!(zlib.is_err(), "{error:?}"),
        }
    }

    #[test]
    fn arbitrary_bytes_are_taken_as_zlib_takes_them(bytes in proptest::collection::vec(any::<u8>(), 0..400), first in 0..8_u8) {
        let mut stream = bytes;
        if let Some(byte) = stream.first_mut() {
            *byte = *byte & !7 | first;
        }
        let mut zlibs = Vec::new();
        let zlib = DeflateDecoder::new(&stream[..]).read_to_end(&mut zlibs);
        let own = all(&stream);
        prop_assert_eq!(own.is_ok(), zlib.is_ok(), "{:?} {:?}", own, zlib);
        prop_assert!(own.map_or(true, |out| out == zlibs));
    }
}

/// The lengths of a complete code of `used` of `all` symbols, `must` among them. The lower `evenness` (at least 1), the
/// more codes are as long as can be.
fn code(
    number: &mut impl FnMut(usize) -> usize,
    (all, used, must): (usize, usize, usize),
    evenness: usize,
) -> Vec<usize> {
    let mut leaves = vec![1, 1];
    while leaves.len() < used {
        let deep = leaves.len() - 1 - number(evenness.min(leaves.len()));
        let at =
            if leaves[deep] < 15 { deep } else { leaves.iter().position(|len| *len < 15).unwrap() };
        leaves[at] += 1;
        let len = leaves[at];
        leaves.push(len);
    }
    let mut symbols: Vec<usize> = (0..all).filter(|symbol| *symbol != must).collect();
    let mut lens = vec![0; all];
    for (n, len) in leaves.into_iter().enumerate() {
        let symbol = if n == 0 { must } else { symbols.swap_remove(number(symbols.len())) };
        lens[symbol] = len;
    }
    lens
}

/// The canonical code of `symbol` among those with these lengths.
fn canonical(lens: &[usize], symbol: usize) -> u64 {
    let before = |at: usize| (lens[at], at) < (lens[symbol], symbol) && lens[at] > 0;
    let places = (0..lens.len()).filter(|at| before(*at));
    places.map(|at| 1_u64 << (lens[symbol] - lens[at])).sum()
}

/// The symbols that are used, and those of them that are in `extended`, whose extra bits are most, or have codes of 10
/// or 11 bits.
fn of_interest(lens: &[usize], extended: std::ops::Range<usize>) -> (Vec<usize>, Vec<usize>) {
    let used: Vec<usize> = (0..lens.len()).filter(|at| lens[*at] > 0).collect();
    let long = |at: &usize| extended.contains(at) || matches!(lens[*at], 10 | 11);
    let long = used.iter().copied().filter(long).collect();
    (used, long)
}

fn pick(number: &mut impl FnMut(usize) -> usize, from: [&[usize]; 2]) -> usize {
    let from = from[number(2)..].iter().chain(&from[..1]).find(|from| !from.is_empty()).unwrap();
    from[number(from.len())]
}

/// A block in which every symbol that has a code is as likely as any other, behind a stored one of a window's length.
fn block_of(seed: u64, (literals, distances): (usize, usize), evenness: usize) -> Vec<u8> {
    let mut number = numbers(seed);
    let lens = code(&mut number, (286, literals, 256), evenness);
    let far = code(&mut number, (30, distances, 0), evenness.min(4));
    let len = WINDOW_LEN as u64 - 1;
    let mut writer = Writer::default().bits(0, 8).bits(len, 16).bits(!len & 0xffff, 16);
    for byte in data(seed, WINDOW_LEN - 1) {
        writer = writer.bits(byte.into(), 8);
    }
    writer = writer.bits(1, 1).bits(2, 2).bits(29, 5).bits(29, 5).bits(15, 4).bits(0, 9);
    // Each length of a code is written by four bits.
    writer = (0..16).fold(writer, |writer, _| writer.bits(4, 3));
    for len in lens.iter().chain(&far) {
        writer = writer.code(*len as u64, 4);
    }
    // Those that take most bits as often as all others.
    let (symbols, long_symbols) = of_interest(&lens, 281..285);
    let (places, long_places) = of_interest(&far, 28..30);
    for _ in 0..3000 {
        let symbol = pick(&mut number, [&symbols, &long_symbols]);
        if symbol == 256 {
            continue;
        }
        writer = writer.code(canonical(&lens, symbol), lens[symbol]);
        if symbol > 256 {
            let extra = if symbol == 285 { 0 } else { ((symbol - 257) / 4).saturating_sub(1) };
            writer = writer.bits(number(1 << extra) as u64, extra);
            let place = pick(&mut number, [&places, &long_places]);
            let extra = (place / 2).saturating_sub(1);
            // Nothing goes back to before the first byte.
            let most = if place == 29 { (1 << extra) - 1 } else { 1 << extra };
            writer =
                writer.code(canonical(&far, place), far[place]).bits(number(most) as u64, extra);
        }
    }
    writer.code(canonical(&lens, 256), lens[256]).bytes
}

proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(1000))]

    /// As hardly any compressor makes them: codes as long as can be, one behind the other, with all their extra bits.
    #[test]
    fn blocks_of_all_codes_are_taken_as_zlib_takes_them(
        seed: u64,
        kinds in (2..=286_usize, 2..=30_usize),
        evenness in 1..40_usize,
        cut in cuts(),
    ) {
        let stream = block_of(seed, kinds, evenness);
        let mut zlibs = Vec::new();
        DeflateDecoder::new(&stream[..]).read_to_end(&mut zlibs).unwrap();
        let (out, _) = decode(&stream, cut, false, |_, _, _, _| ()).unwrap();
        prop_assert!(out == zlibs);
        prop_assert!(all(&stream).unwrap() == zlibs);
    }
}

/// Blocks that end where their writer flushes: empty stored ones, and fixed codes for short ones.
#[test]
fn flushed_streams_come_back() {
    let plain = data(7, 200_000);
    for flush in [FlushCompress::Sync, FlushCompress::Full, FlushCompress::Partial] {
        let mut encoder = flate2::Compress::new(Compression::new(6), false);
        let mut stream = Vec::with_capacity(1 << 20);
        for part in plain.chunks(37) {
            encoder.compress_vec(part, &mut stream, flush).unwrap();
        }
        encoder.compress_vec(&[], &mut stream, FlushCompress::Finish).unwrap();
        for cut in [(1, 1), (7, 1000), (1 << 20, 1 << 20)] {
            let (out, read) = decode(&stream, cut, true, |_, _, _, _| ()).unwrap();
            assert!(out == plain && read == stream.len());
        }
    }
}

/// Bits, first one lowest; codes are written from their highest bit on.
#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
    count: usize,
}

impl Writer {
    fn bits(mut self, value: u64, count: usize) -> Self {
        for n in 0..count {
            if self.count.is_multiple_of(8) {
                self.bytes.push(0);
            }
            *self.bytes.last_mut().unwrap() |= ((value >> n & 1) as u8) << (self.count % 8);
            self.count += 1;
        }
        self
    }

    fn code(self, value: u64, count: usize) -> Self {
        (0..count).rev().fold(self, |writer, n| writer.bits(value >> n & 1, 1))
    }
}

#[test]
fn what_zlib_refuses_is_refused_by_name() {
    let last = |kind| Writer::default().bits(1, 1).bits(kind, 2);
    let rows: [(Writer, &str); 9] = [
        (last(3), "invalid block type"),
        (last(0).bits(0, 5).bits(5, 16).bits(5, 16), "invalid stored block lengths"),
        (last(2).bits(30, 5).bits(0, 5).bits(0, 4), "too many length or distance symbols"),
        (last(2).bits(0, 5).bits(30, 5).bits(0, 4), "too many length or distance symbols"),
        (last(2).bits(0, 5).bits(0, 5).bits(0, 4).bits(0o1111, 12), "more codes than fit"),
        (last(2).bits(0, 5).bits(0, 5).bits(0, 4).bits(0o0003, 12), "codes are missing"),
        (
            last(2).bits(0, 5).bits(0, 5).bits(0, 4).bits(0o0001, 12),
            "codes of code lengths are missing",
        ),
        // The fixed codes 286 and a length of 3 at distance 1 of nothing.
        (last(1).code(0b1100_0110, 8), "invalid literal/length code"),
        (last(1).code(1, 7).code(0, 5), "invalid distance too far back"),
    ];
    for (writer, expected) in rows {
        let stream = [&writer.bytes[..], &[0; 32]].concat();
        assert_eq!(all(&stream), Err(Error::Data(expected)));
        // The same where there is no room to be fast.
        let slow = decode(&stream, (1, 1), false, |_, _, _, _| ());
        assert_eq!(slow.err(), Some(Error::Data(expected)));
    }
}

/// One distance code of one bit, and its other bit, which stands for nothing.
#[test]
fn a_single_distance_code_is_enough() {
    let block = |bit| {
        // 258 literals and lengths, one distance, the lengths of 18 code lengths.
        let lens = Writer::default().bits(1, 1).bits(2, 2).bits(1, 5).bits(0, 5).bits(14, 4);
        // In the order 16 17 18 0 8 7 9 6 10 5 11 4 12 3 13 2 14 1: 18 and 1 and 2.
        let lens = lens.bits(0, 3).bits(0, 3).bits(1, 3);
        let lens = (3..15).fold(lens, |lens, _| lens.bits(0, 3)).bits(2, 3).bits(0, 3).bits(2, 3);
        // Codes: 18 is 0, 1 is 10, 2 is 11.
        let lens = lens.code(0, 1).bits(97 - 11, 7).code(0b10, 2);
        let lens = lens.code(0, 1).bits(138 - 11, 7).code(0, 1).bits(20 - 11, 7);
        let lens = lens.code(0b11, 2).code(0b11, 2).code(0b10, 2);
        // 'a' is 0, the end is 10, a length of 3 is 11.
        lens.code(0, 1).code(0b11, 2).bits(bit, 1).code(0b10, 2)
    };
    assert_eq!(all(&block(0).bytes).unwrap(), b"aaaa");
    assert_eq!(all(&block(1).bytes), Err(Error::Data("invalid distance code")));
}
