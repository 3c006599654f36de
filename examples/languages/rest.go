// Go over REST, by the standard library: go run rest.go http://127.0.0.1:8000
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"
)

type prediction struct {
	Label         string    `json:"label"`
	Probabilities []float64 `json:"probabilities"`
}

func main() {
	url := "http://127.0.0.1:8000"
	if len(os.Args) > 1 {
		url = os.Args[1]
	}
	rows := map[string]any{"instances": []map[string]any{{"island": "Dream", "bill_length_mm": 50.0, "sex": nil}}}
	body, err := json.Marshal(rows)
	if err != nil {
		log.Fatal(err)
	}
	client := &http.Client{Timeout: 10 * time.Second}
	response, err := client.Post(url+"/v1/models/penguins:predict", "application/json", bytes.NewReader(body))
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	var answer struct {
		Predictions []prediction `json:"predictions"`
		Error       string       `json:"error"`
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		log.Fatal(err)
	}
	if answer.Error != "" {
		log.Fatal(answer.Error)
	}
	fmt.Println(answer.Predictions[0].Label)
}
