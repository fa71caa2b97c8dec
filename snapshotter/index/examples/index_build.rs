use std::io::Read;
fn cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}
fn main() {
    let blob = std::fs::read(std::env::args().nth(1).unwrap()).unwrap();
    for _ in 0..3 {
        let t = cpu_s();
        let mut d = flate2::read::MultiGzDecoder::new(&blob[..]);
        let mut buf = vec![0; 256 << 10];
        let mut n = 0;
        loop {
            let k = d.read(&mut buf).unwrap();
            if k == 0 {
                break;
            }
            n += k;
        }
        let plain = cpu_s() - t;
        let t = cpu_s();
        let mut dec = skimmer_index::codec::Decoder::new(1 << 40);
        let mut m = 0;
        for part in blob.chunks(1 << 20) {
            dec.push(part, &mut |b| m += b.len()).unwrap();
        }
        let out = dec.finish(&mut |_| ()).unwrap();
        let ours = cpu_s() - t;
        println!(
            "{n} {m} plain {plain:.3} ours {ours:.3} ratio {:.3} windows {} ({:.4}) chunks {}",
            ours / plain,
            out.windows.len(),
            out.windows.len() as f64 / blob.len() as f64,
            out.chunks.len()
        );
    }
}
