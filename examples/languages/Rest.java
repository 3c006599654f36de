// Java over REST, by the standard library's HttpClient as it is (it offers HTTP/2): java Rest.java http://127.0.0.1:8000
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;

public class Rest {
    public static void main(String[] arguments) throws Exception {
        String url = arguments.length > 0 ? arguments[0] : "http://127.0.0.1:8000";
        String rows = "{\"instances\": [{\"island\": \"Dream\", \"bill_length_mm\": 50.0, \"sex\": null}]}";
        HttpRequest request = HttpRequest.newBuilder(URI.create(url + "/v1/models/penguins:predict"))
                .header("content-type", "application/json")
                .timeout(Duration.ofSeconds(10))
                .POST(HttpRequest.BodyPublishers.ofString(rows))
                .build();
        HttpResponse<String> response = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        if (response.statusCode() != 200) {
            throw new IllegalStateException(response.body());
        }
        System.out.println(response.body());
    }
}
