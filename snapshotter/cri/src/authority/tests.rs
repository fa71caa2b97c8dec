//! What Go's clients send, cut and mixed as networks and enemies do.

use loona_hpack::Encoder;
use proptest::prelude::*;

use super::*;

/// The first request of crictl 1.30 on a connection: grpc-go's header block for `ImageFsInfo`, with Huffman's code and
/// entries for its table.
const GO_BLOCK: &str = "8386459b62cb6a49a92afdc2be4a47317716cee62158c948e62e1464aa53ff41965458534d6a8b0a551618d516\
    1f2a8b092c32e8393aff5f8b1d75d0620d263d4c4d65647a8a9acac8b4c7602bb8cae040027465864d833505b11f408e9acac8b0c842d6958b51\
    0f21aa9b839bd9ab40899acac8b24d494f6a7f8613efbe11336f";

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

fn begun(frames: &[Vec<u8>]) -> Vec<u8> {
    [PREFACE, &frames.concat()].concat()
}

/// crictl's whole first request, with an empty message.
pub fn first_request() -> Vec<u8> {
    begun(&[
        frame(4, 0, 0, &[]),
        frame(HEADERS, END_HEADERS, 1, &hex(GO_BLOCK)),
        frame(0, END_STREAM, 1, &[0; 5]),
    ])
}

fn rewritten(input: &[u8]) -> Result<Vec<u8>, Error> {
    let (mut rewriter, mut output) = (Rewriter::default(), BytesMut::new());
    rewriter.push(input, &mut output)?;
    Ok(output.to_vec())
}

/// The frames of a stream of them, and what a server makes of their headers.
type Seen = Vec<(u8, u8, Vec<(String, String)>)>;

fn seen(output: &[u8]) -> Seen {
    let mut rest = output.strip_prefix(PREFACE).unwrap();
    let mut decoder = Decoder::new();
    let (mut found, mut block) = (Vec::new(), Vec::new());
    while let Some(head) = Head::of(rest) {
        let (payload, after) = rest[HEAD..].split_at(head.len);
        assert!(head.len <= FRAME_BYTES);
        rest = after;
        let mut fields = Vec::new();
        if matches!(head.kind, HEADERS | CONTINUATION) {
            block.extend_from_slice(payload);
            if head.flags & END_HEADERS != 0 {
                let text = |bytes| String::from_utf8(bytes).unwrap();
                fields = decoder.decode(&block).unwrap();
                block.clear();
                let fields = fields.into_iter().map(|(name, value)| (text(name), text(value)));
                found.push((head.kind, head.flags, fields.collect()));
                continue;
            }
        }
        assert!(fields.is_empty());
        found.push((head.kind, head.flags, Vec::new()));
    }
    assert!(rest.is_empty());
    found
}

fn value<'a>(seen: &'a Seen, at: usize, name: &str) -> &'a str {
    let field = seen[at].2.iter().find(|(other, _)| other == name);
    field.map_or("", |(_, value)| value)
}

#[test]
fn requests_of_grpc_go_go_to_localhost() {
    let block = hex(GO_BLOCK);
    // The second request refers to the table that the first has filled.
    let again = [0x83, 0x86, 0xc4, 0xc3, 0xc2, 0xc1, 0xc0, 0xbf];
    let data = frame(0, 1, 1, &[0; 5]);
    let input = begun(&[
        frame(4, 0, 0, &[]),
        frame(HEADERS, END_HEADERS, 1, &block),
        data.clone(),
        frame(HEADERS, END_HEADERS | END_STREAM, 3, &again),
    ]);
    let output = rewritten(&input).unwrap();
    assert!(output.windows(data.len()).any(|window| window == data));
    let seen = seen(&output);
    assert_eq!(seen.iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(), [4, HEADERS, 0, HEADERS]);
    for at in [1, 3] {
        for (name, expected) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/runtime.v1.ImageService/ImageFsInfo"),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            assert_eq!(value(&seen, at, name), expected, "{at}");
        }
    }
    assert_eq!((seen[1].1, seen[3].1), (END_HEADERS, END_HEADERS | END_STREAM));
}

#[test]
fn padding_priority_and_continuations_are_understood() {
    let block = hex(GO_BLOCK);
    let (first, second) = block.split_at(50);
    let padded = [&[3, 0, 0, 0, 0, 16][..], first, &[0; 3]].concat();
    let input = begun(&[
        frame(HEADERS, PADDED | PRIORITY | END_STREAM, 1, &padded),
        frame(CONTINUATION, 0, 1, &[]),
        frame(CONTINUATION, END_HEADERS, 1, second),
    ]);
    let seen = seen(&rewritten(&input).unwrap());
    assert_eq!(seen.len(), 1);
    assert_eq!(value(&seen, 0, ":authority"), "localhost");
    assert_eq!(seen[0].1, END_HEADERS | END_STREAM);
}

#[test]
fn long_headers_go_on_in_several_frames() {
    let long = "x".repeat(3 * FRAME_BYTES);
    let mut encoder = Encoder::new();
    let mut block = Vec::new();
    for field in [(&b":authority"[..], &b"/run/x"[..]), (b"long", long.as_bytes())] {
        encoder.encode_header_into(field, &mut block).unwrap();
    }
    let mut parts: Vec<Vec<u8>> =
        block.chunks(FRAME_BYTES).map(|part| frame(CONTINUATION, 0, 1, part)).collect();
    parts[0][3] = HEADERS;
    parts.last_mut().unwrap()[4] = END_HEADERS;
    let seen = seen(&rewritten(&begun(&parts)).unwrap());
    let last = seen.len() - 1;
    assert_eq!(seen[0].0, HEADERS);
    assert_eq!(value(&seen, last, ":authority"), "localhost");
    assert_eq!(value(&seen, last, "long"), long);
}

#[test]
fn what_is_no_http2_or_too_much_of_it_is_an_error() {
    let headers = |flags, payload: &[u8]| frame(HEADERS, flags, 1, payload);
    let oversized = frame(CONTINUATION, 0, 1, &[0; FRAME_BYTES]);
    // An entry of nearly 4 KiB in the table, and then many references to it.
    let name = [&[0x40, 0x01, b'a', 0x7f, 0x81, 0x1e][..], &[b'x'; 4000]].concat();
    let bomb = [&name[..], &[0xbe; 10_000]].concat();
    for (input, expected) in [
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec(), "doesn't speak HTTP/2"),
        (begun(&[headers(0, &[]), frame(0, 0, 1, &[])]), "a frame of type 0"),
        (begun(&[headers(0, &[]), headers(0, &[])]), "a frame of type 1"),
        (begun(&[headers(0, &[]), frame(CONTINUATION, 0, 3, &[])]), "a frame of type 9"),
        (begun(&[frame(CONTINUATION, 0, 1, &[])]), "never began"),
        (begun(&[headers(PADDED, &[])]), "padding"),
        (begun(&[headers(PADDED, &[1])]), "padding"),
        (begun(&[headers(PRIORITY, &[0; 4])]), "padding"),
        (begun(&[headers(0, &[0; FRAME_BYTES + 1])]), "more than 16384"),
        (begun(&[vec![headers(0, &[])], vec![oversized; 5]].concat()), "bytes of headers"),
        (begun(&[headers(END_HEADERS, &bomb)]), "bytes of headers"),
        (begun(&[headers(END_HEADERS, &[0xff, 0xff, 0xff])]), "decompress headers"),
        (begun(&[headers(END_HEADERS, &[0x3f, 0xe2, 0x1f, 0x82])]), "decompress headers"),
    ] {
        let error = rewritten(&input).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} instead of {expected}");
    }
}

proptest! {
    #[test]
    fn portions_make_no_difference(cuts in prop::collection::vec(1..40usize, 1..50)) {
        let block = hex(GO_BLOCK);
        let input = begun(&[
            frame(4, 0, 0, &[0; 18]),
            frame(HEADERS, 0, 1, &block[..30]),
            frame(CONTINUATION, END_HEADERS, 1, &block[30..]),
            frame(0, 1, 1, &[7; 300]),
            frame(8, 0, 0, &[0; 4]),
        ]);
        let whole = rewritten(&input).unwrap();
        let (mut rewriter, mut output) = (Rewriter::default(), BytesMut::new());
        let (mut rest, mut cuts) = (&input[..], cuts.iter().cycle());
        while !rest.is_empty() {
            rewriter.push(take(&mut rest, *cuts.next().unwrap()), &mut output).unwrap();
        }
        prop_assert_eq!(&output[..], &whole[..]);
    }

    #[test]
    fn any_bytes_are_rewritten_or_refused(
        frames in prop::collection::vec((0..12u8, any::<u8>(), 0..4u8, any::<Vec<u8>>()), 0..20),
        rest: Vec<u8>,
    ) {
        let frames: Vec<_> = frames.iter().map(|(k, f, s, p)| frame(*k, *f, *s, p)).collect();
        for input in [begun(&frames), [&begun(&frames)[..], &rest].concat(), rest] {
            let _ = rewritten(&input);
        }
    }

    #[test]
    fn any_headers_arrive_but_for_the_authority(
        fields in prop::collection::vec(("[a-z:-]{1,20}", "[ -~]{0,60}"), 1..20),
        requests in 1..5u8,
    ) {
        let mut encoder = Encoder::new();
        let blocks: Vec<_> = (0..requests)
            .map(|_| encoder.encode(fields.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes()))))
            .map(|block| frame(HEADERS, END_HEADERS, 1, &block))
            .collect();
        let expected: Vec<_> = fields
            .into_iter()
            .map(|(n, v)| if n == ":authority" { (n, "localhost".to_owned()) } else { (n, v) })
            .collect();
        for (_, _, fields) in seen(&rewritten(&begun(&blocks)).unwrap()) {
            prop_assert_eq!(&fields, &expected);
        }
    }
}
