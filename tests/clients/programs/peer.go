// grpc-go, as one of the peers of tests/clients/test_grpc_peers.py: knows bytes, no messages.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

const (
	infer  = "/inference.GRPCInferenceService/ModelInfer"
	stream = "/inference.GRPCInferenceService/ModelStreamInfer"
)

var folder = os.Args[2]

type raw struct{}

func (raw) Marshal(v interface{}) ([]byte, error)      { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v interface{}) error { *v.(*[]byte) = append([]byte(nil), data...); return nil }
func (raw) Name() string                               { return "proto" }

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func message(name string) []byte {
	content, err := os.ReadFile(filepath.Join(folder, name))
	check(err)
	return content
}

func unary(connection *grpc.ClientConn, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	request, answer := message(name+".request"), []byte{}
	err := connection.Invoke(ctx, infer, &request, &answer)
	return answer, err
}

func expect(connection *grpc.ClientConn, name string) error {
	answer, err := unary(connection, name)
	if err == nil && !bytes.Equal(answer, message(name+".answer")) {
		err = fmt.Errorf("the answer is not %s.answer", name)
	}
	return err
}

func main() {
	options := []grpc.DialOption{
		grpc.WithInsecure(),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{}), grpc.MaxCallRecvMsgSize(1<<30), grpc.MaxCallSendMsgSize(1<<30)),
	}
	if os.Args[3] == "keepalive" { // grpc-go pings at most every 10 s
		options = append(options, grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Second, Timeout: time.Second, PermitWithoutStream: true}))
	}
	connection, err := grpc.Dial(os.Args[1], options...)
	check(err)
	defer connection.Close()
	switch os.Args[3] {
	case "unary":
		for number := 0; number < 100; number++ {
			check(expect(connection, "small"))
		}
	case "error":
		if _, err := unary(connection, "missing"); status.Code(err) != codes.NotFound || len(status.Convert(err).Proto().Details) == 0 {
			check(fmt.Errorf("expected NOT_FOUND with details, got %v", err))
		}
	case "stream":
		call, err := connection.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, stream)
		check(err)
		request, answer := message("small.request"), []byte{}
		for number := 0; number < 200; number++ {
			check(call.SendMsg(&request))
			check(call.RecvMsg(&answer))
			if !bytes.Equal(answer, message("small.streamed")) {
				check(fmt.Errorf("the answer is not small.streamed"))
			}
		}
		check(call.CloseSend())
		if err := call.RecvMsg(&answer); err != io.EOF {
			check(fmt.Errorf("expected the end of the stream, got %v", err))
		}
	case "large":
		check(expect(connection, "large"))
	case "thousand":
		var group sync.WaitGroup
		for number := 0; number < 1000; number++ {
			group.Add(1)
			go func() {
				defer group.Done()
				check(expect(connection, "small"))
			}()
		}
		group.Wait()
	case "busy", "keepalive":
		check(expect(connection, "held"))
		check(expect(connection, "small"))
	}
	fmt.Println("passed")
}
