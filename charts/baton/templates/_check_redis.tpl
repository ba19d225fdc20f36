{{/* Baton's Redis and the one of Ray's GCS: both there, each where it is said to be. */}}
{{- define "baton.checkRedis" -}}
{{- $redis := .Values.redis -}}
{{- $given := or $redis.url $redis.existingSecret -}}
{{- if and $redis.embedded.enabled $given -}}
{{- fail "redis.embedded.enabled and a Redis of your own (redis.url or redis.existingSecret) are both set; choose one" -}}
{{- end -}}
{{- if and $redis.url $redis.existingSecret -}}
{{- fail "redis.url and redis.existingSecret are both set; choose one" -}}
{{- end -}}
{{- if not (or $redis.embedded.enabled $given) -}}
{{- fail "Baton needs a Redis: set redis.existingSecret (a Secret with its URL) or redis.url, or redis.embedded.enabled=true for a trial" -}}
{{- end -}}
{{- if not (regexMatch "^[A-Za-z0-9._~-]*$" (default "" $redis.embedded.password.value)) -}}
{{- fail "redis.embedded.password.value becomes part of a URL; use letters, digits and . _ ~ - alone" -}}
{{- end -}}
{{- include "baton.checkRedisPlace" (dict "policy" .Values.networkPolicy "name" "redis" "setting" "redis.url" "url" $redis.url) -}}
{{- end -}}

{{- define "baton.checkRayRedis" -}}
{{- $redis := .Values.rayRedis -}}
{{- if .Values.ray.gcsFaultTolerance.enabled -}}
{{- if and $redis.address $redis.embedded.enabled -}}
{{- fail "rayRedis.address and rayRedis.embedded.enabled are both set; choose one" -}}
{{- end -}}
{{- if not (or $redis.address $redis.embedded.enabled) -}}
{{- fail "Ray's GCS needs a Redis of its own to outlive its head: set rayRedis.address, or rayRedis.embedded.enabled=true for a trial, or ray.gcsFaultTolerance.enabled=false (then all workers die with the head)" -}}
{{- end -}}
{{- else if $redis.embedded.enabled -}}
{{- fail "rayRedis.embedded.enabled is of no use without ray.gcsFaultTolerance.enabled" -}}
{{- end -}}
{{- if not (regexMatch "^[A-Za-z0-9._~+/=-]*$" (default "" $redis.password.value)) -}}
{{- fail "rayRedis.password.value becomes a word of a shell's and of Redis' configuration; use letters, digits and . _ ~ + / = - alone" -}}
{{- end -}}
{{- $address := default "" $redis.address -}}
{{- if contains "@" $address -}}
{{- fail "rayRedis.address holds a password, which everybody who may read the RayCluster could read; set rayRedis.password" -}}
{{- end -}}
{{- /* Ray splits it at its last colon and takes the rest for a number, or its head does not start;
KubeRay's clean-up knows no default port either. */ -}}
{{- if and $address (not (regexMatch "^rediss?://([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\]):[0-9]{1,5}$" $address)) -}}
{{- fail "rayRedis.address is no address that Ray reads: redis://HOST:PORT, or rediss://HOST:PORT for TLS; one of them, with its port and nothing after it" -}}
{{- end -}}
{{- include "baton.checkRedisPlace" (dict "policy" .Values.networkPolicy "name" "rayRedis" "setting" "rayRedis.address" "url" $address) -}}
{{- end -}}

{{/* Ray's GCS gives up when its Redis is away. Addresses inside of Secrets are not known here. */}}
{{- define "baton.checkOneRedis" -}}
{{- $ours := .Values.redis.url -}}
{{- if .Values.redis.embedded.enabled -}}{{- $ours = printf "redis://%s-redis" (include "baton.fullname" .) -}}{{- end -}}
{{- if and $ours (eq (include "baton.redisPlace" (dict "root" . "url" $ours)) (include "baton.redisPlace" (dict "root" . "url" (include "baton.rayRedisAddress" .)))) -}}
{{- fail "rayRedis and redis are one Redis; Ray gives up when its own is away, so give it one that nobody else fills or restarts" -}}
{{- end -}}
{{- $password := .Values.rayRedis.password -}}
{{- if and $password.existingSecret (eq $password.existingSecret (default "" .Values.redis.existingSecret)) (eq $password.key .Values.redis.key) -}}
{{- fail (printf "redis and rayRedis.password are both the key %s of the Secret %s: Baton takes a URL from there, so Ray would be let in nowhere, or to Baton's own Redis; give Ray's Redis a key of its own" $password.key $password.existingSecret) -}}
{{- end -}}
{{- end -}}

{{/* host:port by which two URLs can be compared. (dict "root" $ "url" …) */}}
{{- define "baton.redisPlace" -}}
{{- $address := include "baton.hostPort" .url | lower -}}
{{- $port := regexFind ":[0-9]+$" $address -}}
{{- $host := $address | trimSuffix $port | trimSuffix "." | trimSuffix ".cluster.local" | trimSuffix ".svc" | trimSuffix (printf ".%s" .root.Release.Namespace) -}}
{{- printf "%s%s" $host $port -}}
{{- end -}}

{{/* host:port of a Redis's URL, without its password. */}}
{{- define "baton.hostPort" -}}
{{- $host := (urlParse .).host -}}
{{- ternary $host (printf "%s:6379" $host) (regexMatch ":[0-9]+$" $host) -}}
{{- end -}}

{{/* Every pod has a loopback of its own, and the policy lets nobody through to another port
     than its own. (dict "policy" … "name" "redis" "setting" "redis.url" "url" …) */}}
{{- define "baton.checkRedisPlace" -}}
{{- if .url -}}
{{- /* Before it is parsed: an error of the parser's shows the password. */ -}}
{{- $word := "([A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*" -}}
{{- if not (regexMatch (printf "^rediss?://(%s@)?([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\])(:[0-9]{1,5})?(/[0-9]*)?([?][^#%% ]*)?$" $word) .url) -}}
{{- fail (printf "%s is no URL of a Redis: redis://:password@host:6379/0, or rediss://, where a password has its special characters escaped, as in %%2F for /" .setting) -}}
{{- end -}}
{{- $place := include "baton.hostPort" .url -}}
{{- if eq (include "baton.isLoopback" (regexReplaceAll ":[0-9]+$" $place "")) "true" -}}
{{- fail (printf "%s is on %s, which is another place in every pod; name a Service or a host" .setting $place) -}}
{{- end -}}
{{- $port := regexFind "[0-9]+$" $place | int -}}
{{- if or (lt $port 1) (gt $port 65535) -}}
{{- fail (printf "%s is on port %d, which is none; use one from 1 to 65535" .setting $port) -}}
{{- end -}}
{{- $open := int (index .policy .name).port -}}
{{- if and .policy.enabled (ne $port $open) -}}
{{- fail (printf "%s is on port %d, but networkPolicy.%s.port is %d; set it to %d" .setting $port .name $open $port) -}}
{{- end -}}
{{- end -}}
{{- end -}}
