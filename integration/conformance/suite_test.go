// Package conformance runs containerd's own snapshotter suite, unmodified, against a snapshotter.
//
// CONFORMANCE_SOCKET is the gRPC socket of a snapshotter or of a containerd, CONFORMANCE_NAME the
// name that it knows the snapshotter by. Without a socket, containerd's overlayfs runs inside this
// process: if that fails, the harness is wrong.
package conformance

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/pkg/dialer"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/overlay"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

func TestSnapshotter(t *testing.T) {
	socket := os.Getenv("CONFORMANCE_SOCKET")
	if socket == "" {
		testsuite.SnapshotterSuite(t, "overlayfs", ownOverlayfs)
		return
	}
	// The suite leaves out checks by the snapshotter's name.
	testsuite.SnapshotterSuite(t, "overlayfs", func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
		conn, err := grpc.Dial(
			dialer.DialAddress(socket),
			grpc.WithInsecure(),
			grpc.WithContextDialer(dialer.ContextDialer),
		)
		if err != nil {
			return nil, nil, err
		}
		client := snapshotsapi.NewSnapshotsClient(conn)
		return proxy.NewSnapshotter(client, os.Getenv("CONFORMANCE_NAME")), conn.Close, nil
	})
}

func ownOverlayfs(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	snapshotter, err := overlay.NewSnapshotter(root)
	if err != nil {
		return nil, nil, err
	}
	return snapshotter, snapshotter.Close, nil
}
