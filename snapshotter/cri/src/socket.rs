//! A client at our unix socket, as hyper may see it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

use crate::authority::Rewriter;

const READ_BYTES: usize = 8 << 10;

/// A connection of which what is read has passed a [`Rewriter`].
pub struct Client {
    stream: UnixStream,
    rewriter: Rewriter,
    /// Rewritten, and not read yet.
    ready: BytesMut,
}

impl From<UnixStream> for Client {
    fn from(stream: UnixStream) -> Self {
        Self { stream, rewriter: Rewriter::default(), ready: BytesMut::new() }
    }
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.ready.is_empty() {
            let mut raw = [0; READ_BYTES];
            let mut raw = ReadBuf::new(&mut raw);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut raw))?;
            if raw.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            let rewritten = this.rewriter.push(raw.filled(), &mut this.ready);
            rewritten.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
        let len = this.ready.len().min(buffer.remaining());
        buffer.put_slice(&this.ready[..len]);
        this.ready.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl Connected for Client {
    type ConnectInfo = <UnixStream as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use bytes::Bytes;
    use http::{Request, Response};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tonic::body::Body;
    use tonic::server::NamedService;
    use tonic::transport::Server;

    use super::*;
    use crate::authority::tests::first_request;

    #[derive(Clone)]
    struct Images;

    impl NamedService for Images {
        const NAME: &'static str = "runtime.v1.ImageService";
    }

    impl tower::Service<Request<Body>> for Images {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Body>) -> Self::Future {
            let authority = request.uri().authority().map(ToString::to_string);
            let body = http_body_util::Full::new(Bytes::from(authority.unwrap_or_default()));
            std::future::ready(Ok(Response::new(Body::new(body))))
        }
    }

    /// What a server says to crictl's first bytes.
    async fn said<S>(wrap: impl FnOnce(UnixStream) -> S) -> Vec<u8>
    where
        S: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let (mut client, theirs) = UnixStream::pair().unwrap();
        let clients = tokio_stream::once(Ok::<_, io::Error>(wrap(theirs)));
        tokio::spawn(Server::builder().add_service(Images).serve_with_incoming(clients));
        client.write_all(&first_request()).await.unwrap();
        let mut said = Vec::new();
        // Until it says no more.
        let _ =
            tokio::time::timeout(Duration::from_millis(500), client.read_to_end(&mut said)).await;
        said
    }

    #[tokio::test]
    async fn a_server_sees_localhost_and_would_refuse_what_was_sent() {
        let has = |said: &[u8], part: &[u8]| said.windows(part.len()).any(|window| window == part);
        assert!(has(&said(Client::from).await, b"localhost"));
        // RST_STREAM of stream 1: PROTOCOL_ERROR. Once hyper takes it, this module can go.
        let refusal = [0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 1];
        assert!(has(&said(|stream| stream).await, &refusal));
    }

    #[tokio::test]
    async fn what_is_no_http2_ends_the_connection() {
        let (mut client, theirs) = UnixStream::pair().unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let error = Client::from(theirs).read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
