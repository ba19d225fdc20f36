{{- define "baton.secretName" -}}
{{ include "baton.fullname" . }}-secrets
{{- end -}}

{{- define "baton.rayTokenSecretName" -}}
{{- default (printf "%s-ray-token" (include "baton.fullname" .)) .Values.secrets.rayToken.existingSecret -}}
{{- end -}}

{{/* A secret's value: the given one, else the live Secret's, else a new one where allowed.
     (dict "root" $ "entry" … "secret" <Secret's name> "key" … "what" <path of the values>) */}}
{{- define "baton.secretValue" -}}
{{- $value := .entry.value -}}
{{- $where := printf "%s.value" .what -}}
{{- if not $value -}}
{{- $live := lookup "v1" "Secret" .root.Release.Namespace .secret -}}
{{- if $live -}}{{- $value = index (default (dict) $live.data) .key | default "" | b64dec -}}{{- end -}}
{{- $where = printf "the key %s of the Secret %s, which an earlier install made," .key .secret -}}
{{- end -}}
{{- if $value -}}
{{- if hasPrefix "secrets." .what -}}{{- include "baton.checkCredential" (dict "what" $where "value" $value) -}}{{- end -}}
{{- $value -}}
{{- else if .root.Values.secrets.generate -}}
{{- randAlphaNum 40 -}}
{{- else -}}
{{- fail (printf "%s has no value: set %s.value or %s.existingSecret, or secrets.generate=true for a random one that later upgrades keep" .what .what .what) -}}
{{- end -}}
{{- end -}}

{{/* What baton/credentials.py refuses at start: tests compare the two. Ray's token goes by gRPC,
     which aborts the process on anything but ASCII. The sentence never shows the value.
     (dict "what" … "value" …) */}}
{{- define "baton.checkCredential" -}}
{{- if not (regexMatch "^[\\t\\n\\v\\f\\r ]*[!-~]+[\\t\\n\\v\\f\\r ]*$" .value) -}}
{{- fail (printf "%s has to be one word of visible ASCII, without whitespace or control characters inside: it travels in headers, which carry nothing else to everybody" .what) -}}
{{- end -}}
{{- end -}}

{{/* One variable from a Secret. (dict "root" $ "name" BATON_SECRET "entry" .Values.secrets.cluster) */}}
{{- define "baton.secretEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ default (include "baton.secretName" .root) .entry.existingSecret | quote }}
      key: {{ .entry.key | quote }}
{{- end -}}

{{/* REDIS_URL, of a Redis of yours or of the embedded one. */}}
{{- define "baton.redisEnv" -}}
{{- if .Values.redis.embedded.enabled -}}
{{ include "baton.secretEnv" (dict "root" . "name" "REDIS_PASSWORD" "entry" .Values.redis.embedded.password) }}
- name: REDIS_URL
  value: redis://:$(REDIS_PASSWORD)@{{ include "baton.fullname" . }}-redis:6379/0
{{- else -}}
{{ include "baton.secretEnv" (dict "root" . "name" "REDIS_URL" "entry" .Values.redis) }}
{{- end -}}
{{- end -}}

{{/* What a Ray client needs to be let in. KubeRay gives its own pods the same. */}}
{{- define "baton.rayTokenEnv" -}}
{{- if .Values.ray.auth.enabled -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "baton.rayTokenSecretName" . | quote }}
      key: auth_token
{{- end -}}
{{- end -}}
