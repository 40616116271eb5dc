// echo stands in for a predictor and a transformer where only the cluster is under test. It answers any HTTP
// request with a description of it, any gRPC call with the bytes it got, over HTTP/1.1 and h2c on every port.
// With -predictor_host (which KServe gives to a transformer) it forwards the request and adds the answer.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
)

type answer struct {
	Model     string          `json:"model"`
	Pod       string          `json:"pod"`
	Protocol  string          `json:"protocol"`
	Method    string          `json:"method"`
	Path      string          `json:"path"`
	Host      string          `json:"host"`
	Body      string          `json:"body"`
	Predictor json.RawMessage `json:"predictor,omitempty"`
}

func main() {
	model := flag.String("model_name", "echo", "name in the answers")
	predictor := flag.String("predictor_host", "", "forward requests to this host")
	port := flag.String("http_port", "8080", "port")
	second := flag.String("grpc_port", "", "second port, for a service that tells protocols apart by it")
	flag.Int("workers", 1, "accepted, since KServe sets it; not used")
	flag.Parse()
	pod, _ := os.Hostname()

	handler := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Trailer", "Grpc-Status")
			w.Write(body) // one framed message in, the same frame out
			w.Header().Set("Grpc-Status", "0")
			return
		}
		out := answer{Model: *model, Pod: pod, Protocol: r.Proto, Method: r.Method, Path: r.URL.Path, Host: r.Host,
			Body: string(body)}
		if *predictor != "" && r.Method == http.MethodPost {
			reply, err := http.Post("http://"+*predictor+r.URL.Path, r.Header.Get("Content-Type"), bytes.NewReader(body))
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			defer reply.Body.Close()
			if out.Predictor, err = io.ReadAll(reply.Body); err != nil || !json.Valid(out.Predictor) {
				http.Error(w, "the predictor's answer isn't JSON: "+string(out.Predictor), http.StatusBadGateway)
				return
			}
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(out)
	}

	serve := func(port string) {
		server := http.Server{Addr: ":" + port, Handler: http.HandlerFunc(handler), Protocols: new(http.Protocols)}
		server.Protocols.SetHTTP1(true)
		server.Protocols.SetUnencryptedHTTP2(true)
		log.Printf("%s on port %s, predictor %q", *model, port, *predictor)
		log.Fatal(server.ListenAndServe())
	}
	if *second != "" {
		go serve(*second)
	}
	serve(*port)
}
