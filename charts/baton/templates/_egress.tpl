{{/* Egress rules to what may lie inside or outside of the release. */}}
{{- define "baton.toRedis" -}}
{{- if .Values.redis.embedded.enabled -}}
- to:
    - podSelector:
        matchLabels: {{- include "baton.selectorLabels" (dict "root" . "component" "redis") | nindent 10 }}
  ports:
    - {port: redis, protocol: TCP}
{{- else -}}
- ports:
    - {port: {{ int .Values.networkPolicy.redis.port }}, protocol: TCP}
  {{- with .Values.networkPolicy.redis.to }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "baton.toRayRedis" -}}
{{- if .Values.rayRedis.embedded.enabled -}}
- to:
    - podSelector:
        matchLabels: {{- include "baton.selectorLabels" (dict "root" . "component" "ray-redis") | nindent 10 }}
  ports:
    - {port: redis, protocol: TCP}
{{- else if .Values.ray.gcsFaultTolerance.enabled -}}
- ports:
    - {port: {{ int .Values.networkPolicy.rayRedis.port }}, protocol: TCP}
  {{- with .Values.networkPolicy.rayRedis.to }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "baton.toModelHub" -}}
{{- if eq .Values.model.source "huggingFace" -}}
- ports:
    - {port: 443, protocol: TCP}
{{- end -}}
{{- end -}}
