// Upstream: a canned Ollama for the bench, as fast as Go makes it.
//
//	upstream ADDRESS
//
// It answers every request with one whole chat answer. With ?frames=N it streams N frames and a last
// one, each flushed by itself; with &every=M it sends one every M milliseconds. A frame's created_at
// is the time at which it is sent, so that a client on the same machine can tell how old it is.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"time"
)

const (
	clock = "2006-01-02T15:04:05.000000000Z"
	start = `{"model":"bench","created_at":"%s","message":{"role":"assistant","content":"`
	frame = start + ` word"},"done":false}` + "\n"
	last  = `"},"done":true,"done_reason":"stop","total_duration":4883583458,"load_duration":1334875,` +
		`"prompt_eval_count":26,"prompt_eval_duration":342546000,"eval_count":200,` +
		`"eval_duration":4535599000}`
	end   = start + last + "\n"
	whole = start + `The sky is blue because air scatters short waves of light more than long ones, ` +
		`and blue is the shortest that we see well.` + last
)

func main() {
	log.Fatal(http.ListenAndServe(os.Args[1], http.HandlerFunc(answer)))
}

func answer(w http.ResponseWriter, r *http.Request) {
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return
	}
	query := r.URL.Query()
	if frames, _ := strconv.Atoi(query.Get("frames")); frames > 0 {
		every, _ := strconv.Atoi(query.Get("every"))
		stream(w, frames, time.Duration(every)*time.Millisecond)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	if r.URL.Path == "/api/version" {
		io.WriteString(w, `{"version":"0.0.0"}`)
		return
	}
	write(w, whole)
}

func stream(w http.ResponseWriter, frames int, every time.Duration) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	flusher := w.(http.Flusher)
	for ; frames > 0; frames-- {
		if err := write(w, frame); err != nil {
			return
		}
		flusher.Flush()
		time.Sleep(every)
	}
	write(w, end)
}

func write(w io.Writer, template string) error {
	_, err := fmt.Fprintf(w, template, time.Now().UTC().Format(clock))
	return err
}
